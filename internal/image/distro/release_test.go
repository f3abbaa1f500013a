package distro

import (
	"strings"
	"testing"

	"github.com/smolvm/smolvm/internal/image/deb"
)

func TestReadRelease(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]Release{
		"ID=debian\nVERSION_CODENAME=bookworm\n":                                     {"debian", "bookworm", "amd64"},
		"ID=ubuntu\nVERSION_CODENAME=noble\nUBUNTU_CODENAME=noble\n":                 {"ubuntu", "noble", "amd64"},
		"ID=\"linuxmint\"\nVERSION_CODENAME=virginia\nUBUNTU_CODENAME='jammy'\n":     {"ubuntu", "jammy", "amd64"},
		"ID=lmde\nVERSION_CODENAME=faye\nDEBIAN_CODENAME=bookworm\nID_LIKE=debian\n": {"debian", "bookworm", "amd64"},
		"ID=fedora\nVERSION_ID=42\n":                                                 {"fedora", "", "amd64"},
		"":                                                                           {"", "", "amd64"},
	} {
		if got := readRelease(text, "amd64"); got != want {
			t.Errorf("%q reads as %+v, want %+v", text, got, want)
		}
	}
}

// A guest gets no names, passwords and mirrors of the host that are of no use to it.
func TestMirrors(t *testing.T) {
	t.Parallel()
	target := func(uri, release, codename, component, origin string) deb.Paragraph {
		return deb.Paragraph{
			{Name: "Repo-URI", Value: uri}, {Name: "Release", Value: release}, {Name: "Codename", Value: codename},
			{Name: "Component", Value: component}, {Name: "Origin", Value: origin},
		}
	}
	release := Release{"debian", "bookworm", "amd64"}
	got := release.mirrors([]deb.Paragraph{
		target("https://me:secret@mirror.example/debian/", "bookworm", "bookworm", "main", "Debian"),
		target("https://me:secret@mirror.example/debian/", "bookworm", "bookworm", "contrib", "Debian"),
		target("http://others.example/", "bookworm", "bookworm", "main", "Others"),
		target("file:/srv/mirror/", "bookworm-updates", "bookworm-updates", "main", "Debian"),
		target("http://mirror.example/", "trixie", "trixie", "main", "Debian"),
		target("http://security.example/", "bookworm-security", "bookworm-security", "main", "Debian"),
	})
	want := "Types: deb\nURIs: https://mirror.example/debian/\nSuites: bookworm\nComponents: main contrib\nSigned-By: /usr/share/keyrings/debian-archive-keyring.gpg\n\n" +
		"Types: deb\nURIs: http://security.example/\nSuites: bookworm-security\nComponents: main\nSigned-By: /usr/share/keyrings/debian-archive-keyring.gpg\n\n"
	if got != want {
		t.Errorf("the mirrors are\n%s", got)
	}
	for id, want := range map[string]string{"debian": "deb.debian.org", "ubuntu": "ubuntu.com", "fedora": ""} {
		usual := Release{id, "x", "arm64"}.mirrors(nil)
		if want == "" && usual != "" || !strings.Contains(usual, want) {
			t.Errorf("the usual mirrors of %s are %q", id, usual)
		}
	}
}
