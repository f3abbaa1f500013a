package distro

import (
	"cmp"
	"os"
	"strings"
)

// Release is the release of a distribution.
type Release struct {
	// ID is the distribution, as in "debian".
	ID string
	// Codename is the release's name, as in "bookworm"; empty where it has none.
	Codename string
	// Arch is the architecture as Debian names it.
	Arch string
}

// HostRelease tells which distribution's packages this host has. A derivative that says so has
// those of the release that it is made from.
func HostRelease(arch string) Release {
	text, err := os.ReadFile("/etc/os-release")
	if err != nil {
		text, _ = os.ReadFile("/usr/lib/os-release")
	}
	return readRelease(string(text), arch)
}

func readRelease(text, arch string) Release {
	values := map[string]string{}
	for line := range strings.Lines(text) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		values[name] = strings.Trim(value, `"'`)
	}
	r := Release{ID: values["ID"], Codename: values["VERSION_CODENAME"], Arch: arch}
	switch {
	case r.ID == "debian" || r.ID == "ubuntu":
	case values["UBUNTU_CODENAME"] != "":
		r.ID, r.Codename = "ubuntu", values["UBUNTU_CODENAME"]
	case values["DEBIAN_CODENAME"] != "":
		r.ID, r.Codename = "debian", values["DEBIAN_CODENAME"]
	}
	return r
}

// origin returns what the distribution calls itself in the signed files of its mirrors.
func (r Release) origin() string {
	switch r.ID {
	case "debian":
		return "Debian"
	case "ubuntu":
		return "Ubuntu"
	}
	return ""
}

// String returns the release in words, as in "debian bookworm".
func (r Release) String() string {
	return strings.TrimSpace(cmp.Or(r.ID, "an unknown distribution") + " " + r.Codename)
}

// preferences returns rules that prefer packages of this release to those of others that the
// host takes packages from, which may not go together with it: the host's version of Node.js is
// often another's. They are there for packages that the release has not. See apt_preferences(5).
func (r Release) preferences() string {
	if r.origin() == "" || r.Codename == "" {
		return ""
	}
	var text strings.Builder
	rule := func(pin, priority string) {
		text.WriteString("Package: *\nPin: release " + pin + "\nPin-Priority: " + priority + "\n\n")
	}
	// The first rule that matches counts. Backports and proposed updates stay as the host has them.
	for _, kind := range []string{"backports", "proposed", "backports-sloppy", "proposed-updates"} {
		rule("a="+r.Codename+"-"+kind, "100")
		rule("n="+r.Codename+"-"+kind, "100")
	}
	for _, suite := range []string{"", "-updates", "-security"} {
		rule("o="+r.origin()+",n="+r.Codename+suite, "600")
	}
	return text.String()
}
