package size

import "testing"

func TestParseMebibytes(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]int64{"512": 512, "512M": 512, "2gb": 2048, "1T": 1 << 20, "0": 0} {
		if got, err := ParseMebibytes(text); err != nil || got != want {
			t.Errorf("ParseMebibytes(%q) = %d, %v; want %d", text, got, err, want)
		}
	}
	for _, text := range []string{"", "M", "-1", "1.5G", "99999999999T", "9999999999999"} {
		if got, err := ParseMebibytes(text); err == nil {
			t.Errorf("ParseMebibytes(%q) = %d, want an error", text, got)
		}
	}
}

func TestParseBytes(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]int64{"512K": 512 << 10, "64kib": 64 << 10, "2": 2 << 20, "3M": 3 << 20, "1G": 1 << 30, "0": 0, "0K": 0} {
		if got, err := ParseBytes(text); err != nil || got != want {
			t.Errorf("ParseBytes(%q) = %d, %v; want %d", text, got, err, want)
		}
	}
	for _, text := range []string{"", "K", "-1K", "1.5M", "9223372036854775807K", "99999999999T"} {
		if got, err := ParseBytes(text); err == nil {
			t.Errorf("ParseBytes(%q) = %d, want an error", text, got)
		}
	}
}
