package api

import (
	"context"
	"fmt"
	"strconv"
	"strings"
)

// Version is that of a release of Firecracker. Patch releases differ in nothing that matters
// to the API, but they do in faults.
type Version struct{ Major, Minor, Patch int }

// Oldest returns the oldest release that this package speaks to. It is the first with huge
// pages for a guest's memory, and with a version of the snapshots' format.
func Oldest() Version { return Version{1, 7, 0} }

// String returns the version as Firecracker prints it, without a "v".
func (v Version) String() string { return fmt.Sprintf("%d.%d.%d", v.Major, v.Minor, v.Patch) }

// Before reports whether a version is older than another.
func (v Version) Before(other Version) bool {
	switch {
	case v.Major != other.Major:
		return v.Major < other.Major
	case v.Minor != other.Minor:
		return v.Minor < other.Minor
	}
	return v.Patch < other.Patch
}

// ParseVersion reads a version such as "1.12.1", "v1.12.1" or "1.17.0-dev".
func ParseVersion(text string) (Version, error) {
	numbers, _, _ := strings.Cut(strings.TrimPrefix(strings.TrimSpace(text), "v"), "-")
	parts := strings.Split(numbers, ".")
	const all = 3
	var v Version
	if len(parts) != all {
		return v, fmt.Errorf("%.40q is no version", text)
	}
	for i, into := range []*int{&v.Major, &v.Minor, &v.Patch} {
		n, err := strconv.ParseUint(parts[i], 10, 16)
		if err != nil {
			return Version{}, fmt.Errorf("%.40q is no version", text)
		}
		*into = int(n)
	}
	return v, nil
}

// Feature is something that some releases of Firecracker can't do.
type Feature int

// Features beyond [Oldest]. The first version of each is that of its entry in Firecracker's
// CHANGELOG.md, whose number is given, and of the API document of that release
// (src/firecracker/swagger/firecracker.yaml).
const (
	// PartialMachineConfig: PATCH /machine-config without all fields (#4991).
	PartialMachineConfig Feature = iota
	// NetworkOverrides: another TAP interface for a restored guest (#4731).
	NetworkOverrides
	// TrackDirtyOnLoad: track_dirty_pages of a restored guest (#5274). It was called
	// enable_diff_snapshots before.
	TrackDirtyOnLoad
	// UntrackedDiff: diff snapshots of a guest whose dirty pages are not tracked (#5274).
	UntrackedDiff
	// Serial: the serial console's file (#5350).
	Serial
	// FreePages: the balloon's free page hinting and reporting (#5491).
	FreePages
	// MTU: the MTU that a network interface offers to the guest (#5828).
	MTU
	// VsockOverride: another vsock socket for a restored guest (#5323).
	VsockOverride
	// SerialLimit: a limit of the serial console's speed (#5824).
	SerialLimit
	// ClockRealtime: a restored guest's clock goes on by the time that has passed (#5809).
	ClockRealtime
	// TransparentHugePages for the guest's memory (#6003).
	TransparentHugePages
	// HugePagesOnLoad: huge pages of a restored guest (#6064).
	HugePagesOnLoad
	// MetricsLabels: the id and properties in each line of metrics (#5983).
	MetricsLabels
	// BzImage: a kernel that is a bzImage (#6037).
	BzImage
)

// name and since are a feature's words and its first version.
func (f Feature) about() (name string, since Version) {
	switch f {
	case PartialMachineConfig:
		return "changing a part of the machine's configuration", Version{1, 11, 0}
	case NetworkOverrides:
		return "another TAP interface for a restored guest", Version{1, 12, 0}
	case TrackDirtyOnLoad:
		return "tracking the pages that a restored guest writes to", Version{1, 13, 0}
	case UntrackedDiff:
		return "a diff snapshot of a guest whose pages are not tracked", Version{1, 13, 0}
	case Serial:
		return "a file for the serial console", Version{1, 14, 0}
	case FreePages:
		return "free page hinting and reporting", Version{1, 14, 0}
	case MTU:
		return "an MTU that the network interface offers", Version{1, 16, 0}
	case VsockOverride:
		return "another vsock socket for a restored guest", Version{1, 16, 0}
	case SerialLimit:
		return "a limit of the serial console's speed", Version{1, 16, 0}
	case ClockRealtime:
		return "a restored guest's clock that goes on", Version{1, 16, 0}
	case TransparentHugePages:
		return "transparent huge pages", Version{1, 17, 0}
	case HugePagesOnLoad:
		return "huge pages of a restored guest", Version{1, 17, 0}
	case MetricsLabels:
		return "labels of metrics", Version{1, 17, 0}
	case BzImage:
		return "a kernel in the form of a bzImage", Version{1, 17, 0}
	}
	panic(fmt.Sprintf("feature %d is not in the table", int(f)))
}

// In reports whether a release has the feature.
func (f Feature) In(v Version) bool {
	_, since := f.about()
	return !v.Before(since)
}

// String returns the feature in words.
func (f Feature) String() string {
	name, _ := f.about()
	return name
}

// PauseBreaksVsock reports whether a release forgets the vsock connections of a guest that is
// paused and goes on without having been saved: no data reaches the guest from then on. The
// fault came with #5882 in 1.16.0 and went with #6100, after 1.16.1.
func PauseBreaksVsock(v Version) bool {
	return !v.Before(Version{1, 16, 0}) && v.Before(Version{1, 17, 0})
}

// ResetBreaksNewVsock reports whether a vsock connection to a guest that was just saved or
// restored can be broken: the guest is told that all its connections are gone, and may take a
// new one before it notices. #5882, in 1.16.0, holds new ones back until it has.
func ResetBreaksNewVsock(v Version) bool { return v.Before(Version{1, 16, 0}) }

// TooOldError is the error of a request that Firecracker is too old for.
type TooOldError struct {
	Feature Feature
	Version Version
}

func (e *TooOldError) Error() string {
	_, since := e.Feature.about()
	return fmt.Sprintf("Firecracker %s is too old for %s, which came with %s", e.Version, e.Feature, since)
}

// Version asks Firecracker for its version. Features beyond [Oldest] can be used once it has
// been asked.
func (c *Client) Version(ctx context.Context) (Version, error) {
	var answer struct {
		Version string `json:"firecracker_version"`
	}
	if err := c.get(ctx, "/version", &answer); err != nil {
		return Version{}, err
	}
	v, err := ParseVersion(answer.Version)
	if err != nil {
		return v, fmt.Errorf("GET /version: Firecracker's answer can't be read: %w", err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.version = v
	return v, nil
}

// needs returns an error if Firecracker lacks one of the features that are used.
func (c *Client) needs(used map[Feature]bool) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	for feature, is := range used {
		if is && !feature.In(c.version) {
			return &TooOldError{feature, c.version}
		}
	}
	return nil
}
