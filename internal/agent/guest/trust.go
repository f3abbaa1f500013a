package guest

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
)

// trust makes the guest's programs trust an authority of the host's, beside those of its
// distribution. The authority is another one at each start, and in each clone.
type trust struct{ root string }

const (
	// authorityFile has the authority alone.
	authorityFile = "etc/ssl/smolvm-authority.pem"
	// The lines around the authority in a bundle.
	authorityBegin, authorityEnd = "# begin of smolvm's authority\n", "# end of smolvm's authority\n"
	// maxBundle is how long a bundle may be, in bytes: several times what distributions have.
	maxBundle = 4 << 20
)

// bundles are the files in which distributions have the authorities that they trust: Debian,
// Alpine and Arch; Fedora; SUSE; and that of OpenSSL's own directory. The first one is made if
// there is none.
func bundles() []string {
	return []string{
		"etc/ssl/certs/ca-certificates.crt", "etc/pki/tls/certs/ca-bundle.crt", "etc/ssl/ca-bundle.pem", "etc/ssl/cert.pem",
	}
}

// sources are the directories whose authorities a distribution puts into the bundle when it
// makes that anew, each with the name of ours in it.
func sources() []string {
	return []string{"usr/local/share/ca-certificates/smolvm.crt", "etc/pki/ca-trust/source/anchors/smolvm.pem"}
}

// set makes an authority, as PEM, the one that is trusted, and returns the variables by which
// programs find it. Empty: there is none, and the one before is taken away.
func (t trust) set(authority []byte) (env map[string]string, err error) {
	own := t.path(authorityFile)
	if len(authority) == 0 {
		if _, err := os.Lstat(own); err != nil {
			return nil, nil //nolint:nilerr // there was none before
		}
	}
	var errs []error
	bundle := ""
	for _, name := range bundles() {
		switch found, err := t.setIn(name, authority); {
		case err != nil:
			errs = append(errs, err)
		case found && bundle == "":
			bundle = name
		}
	}
	if len(authority) == 0 {
		for _, name := range append(sources(), authorityFile) {
			errs = append(errs, ignoreMissing(os.Remove(t.path(name))))
		}
		return nil, wrapTrust(errs)
	}
	if bundle == "" {
		bundle = bundles()[0]
		errs = append(errs, t.write(bundle, marked(authority)))
	}
	errs = append(errs, t.write(authorityFile, authority))
	for i, name := range sources() {
		// The first is Debian's and Alpine's, whose package may come later.
		if _, err := os.Stat(filepath.Dir(t.path(name))); err == nil || i == 0 {
			errs = append(errs, t.write(name, authority))
		}
	}
	return trustEnv("/"+bundle, "/"+authorityFile), wrapTrust(errs)
}

func wrapTrust(errs []error) error {
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("trust the VM's authority: %w", err)
	}
	return nil
}

// trustEnv returns the variables by which programs find the authorities that they trust: in a
// bundle with all of them, or only ours, where a program adds it to its own.
func trustEnv(bundle, own string) map[string]string {
	env := map[string]string{"NODE_EXTRA_CA_CERTS": own, "DENO_CERT": own}
	for _, name := range []string{
		"SSL_CERT_FILE",                    // OpenSSL, Go, Python, Ruby
		"CURL_CA_BUNDLE", "GIT_SSL_CAINFO", // curl, git
		"REQUESTS_CA_BUNDLE", "PIP_CERT", "AWS_CA_BUNDLE", // Python's requests, pip, AWS
		"CARGO_HTTP_CAINFO", "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH",
	} {
		env[name] = bundle
	}
	return env
}

// withDefaults returns the variables of a map, and those of another that are not in it.
func withDefaults(env, defaults map[string]string) map[string]string {
	if len(defaults) == 0 {
		return env
	}
	all := maps.Clone(defaults)
	maps.Copy(all, env)
	return all
}

func (t trust) path(name string) string { return filepath.Join(t.root, name) }

// setIn puts the authority into a bundle, in place of the one before, and reports whether there
// is that bundle. A link is followed: several may lead to one bundle.
func (t trust) setIn(name string, authority []byte) (found bool, err error) {
	info, err := os.Stat(t.path(name))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return false, nil
	case err != nil:
		return false, err
	case !info.Mode().IsRegular() || info.Size() > maxBundle:
		return false, nil
	}
	old, err := os.ReadFile(t.path(name))
	if err != nil {
		return true, err
	}
	text := withoutMarked(old)
	if len(authority) > 0 {
		if len(text) > 0 && text[len(text)-1] != '\n' {
			text = append(text, '\n')
		}
		text = append(text, marked(authority)...)
	}
	if bytes.Equal(old, text) {
		return true, nil
	}
	return true, overwrite(t.path(name), info.Size(), string(text))
}

// marked returns an authority with the lines around it.
func marked(authority []byte) []byte {
	return append(append([]byte(authorityBegin), authority...), authorityEnd...)
}

// withoutMarked returns a bundle without the authority of before. What follows a first line that
// has no last one stays.
func withoutMarked(bundle []byte) []byte {
	before, rest, ok := bytes.Cut(bundle, []byte(authorityBegin))
	if !ok {
		return bundle
	}
	_, after, ok := bytes.Cut(rest, []byte(authorityEnd))
	if !ok {
		return bundle
	}
	return append(slices.Clip(before), after...)
}

// write writes a file whole, beside it first.
func (t trust) write(name string, text []byte) error {
	path := t.path(name)
	if old, err := os.ReadFile(path); err == nil && bytes.Equal(old, text) {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	temp := path + ".smolvm"
	if err := os.WriteFile(temp, text, 0o644); err != nil {
		return err
	}
	return os.Rename(temp, path)
}

func ignoreMissing(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}
