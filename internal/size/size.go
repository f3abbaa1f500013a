// Package size reads and prints sizes of memory and disks as people write them.
package size

import (
	"fmt"
	"math"
	"strconv"
	"strings"
)

// ParseMebibytes reads a size such as "512", "512M" or "2G", in MiB. Units are binary,
// however they are written.
func ParseMebibytes(text string) (int64, error) {
	upper := strings.ToUpper(text)
	digits := strings.TrimRight(upper, "BIKMGT")
	shift, ok := map[string]int{
		"": 0, "M": 0, "MB": 0, "MIB": 0,
		"G": 10, "GB": 10, "GIB": 10,
		"T": 20, "TB": 20, "TIB": 20,
	}[upper[len(digits):]]
	n, err := strconv.ParseInt(digits, 10, 64)
	if !ok || err != nil || n < 0 || n > math.MaxInt64>>20>>shift {
		return 0, fmt.Errorf("invalid size %q; use a number of MiB, or one with M, G or T", text)
	}
	return n << shift, nil
}

// ParseBytes reads a size as [ParseMebibytes] does, or one in KiB such as "512K", in bytes.
func ParseBytes(text string) (int64, error) {
	upper := strings.ToUpper(text)
	for _, unit := range []string{"KIB", "KB", "K"} {
		if digits, ok := strings.CutSuffix(upper, unit); ok {
			n, err := strconv.ParseInt(digits, 10, 64)
			if err != nil || n < 0 || n > math.MaxInt64>>10 {
				return 0, fmt.Errorf("invalid size %q; use a number of MiB, or one with K, M, G or T", text)
			}
			return n << 10, nil
		}
	}
	mebibytes, err := ParseMebibytes(text) // which is none whose bytes can't be counted
	return mebibytes << 20, err
}

// Format writes a number of bytes in binary units.
func Format(n int64) string {
	const units = "KMGT"
	if n < 1<<10 {
		return fmt.Sprintf("%d B", n)
	}
	value, unit := float64(n)/(1<<10), 0
	for value >= 1<<10 && unit < len(units)-1 {
		value, unit = value/(1<<10), unit+1
	}
	return fmt.Sprintf("%.1f %ciB", value, units[unit])
}
