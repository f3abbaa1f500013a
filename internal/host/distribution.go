package host

import "strings"

// install returns the command that installs a package on this host, or nothing if
// its distribution is not known or does not have it.
func (h *Host) install(packages map[string]string) string {
	manager := packageManager(h.read("etc/os-release"))
	name := packages[manager]
	if name == "" {
		return ""
	}
	switch manager {
	case "apt":
		// A fresh container or cloud image knows of no packages yet.
		return h.sudo("apt-get update") + " && " + h.sudo("apt-get install -y --no-install-recommends "+name)
	case "dnf":
		return h.sudo("dnf install -y " + name)
	case "pacman":
		return h.sudo("pacman -S --needed " + name)
	case "apk":
		return h.sudo("apk add " + name)
	default:
		return h.sudo("zypper install -y " + name)
	}
}

// sudo puts sudo before a command if we may not run it ourselves.
func (h *Host) sudo(command string) string {
	if h.uid == 0 {
		return command
	}
	return "sudo " + command
}

// packageManager names the package manager of a distribution, known by its
// os-release(5), or returns nothing.
func packageManager(osRelease string) string {
	managers := map[string]string{
		"debian": "apt", "ubuntu": "apt",
		"fedora": "dnf", "rhel": "dnf", "centos": "dnf",
		"arch":   "pacman",
		"alpine": "apk",
		"suse":   "zypper", "opensuse": "zypper",
	}
	// ID names the distribution itself; ID_LIKE those that it derives from, the
	// closest first.
	names := []string{osReleaseField(osRelease, "ID")}
	names = append(names, strings.Fields(osReleaseField(osRelease, "ID_LIKE"))...)
	for _, name := range names {
		if manager := managers[name]; manager != "" {
			return manager
		}
	}
	return ""
}

func osReleaseField(text, field string) string {
	for line := range strings.Lines(text) {
		if value, found := strings.CutPrefix(line, field+"="); found {
			return strings.Trim(strings.TrimSpace(value), `"'`)
		}
	}
	return ""
}
