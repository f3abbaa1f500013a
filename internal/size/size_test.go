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
