package distro

import _ "embed"

//go:embed configure.sh
var configureScript string

// imageFiles returns the files that every image has beside those of packages, given the sources
// of apt in it.
func imageFiles(release Release, sources string) []File {
	return []File{
		{Path: "/etc/dpkg/dpkg.cfg.d/smolvm", Mode: 0o644, Content: dpkgConfig},
		// No service is started by being installed: a guest has no init that would look after it.
		{Path: "/usr/sbin/policy-rc.d", Mode: 0o755, Content: "#!/bin/sh\nexit 101\n"},
		{Path: "/etc/apt/sources.list.d/distribution.sources", Mode: 0o644, Content: sources},
		{Path: "/var/lib/dpkg/arch", Mode: 0o644, Content: release.Arch + "\n"},
	}
}
