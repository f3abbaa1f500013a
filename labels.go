package smolvm

import (
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"
)

// maxLabelPrefix is the longest DNS name, in bytes (RFC 1035).
const maxLabelPrefix = 253

// ValidateLabel checks a label of a VM; the error is a [*ValidationError]. Names are
// those of Kubernetes: letters and digits, with '.', '_' and '-' inside, at most
// [MaxLabelName]; before that there may be a DNS name and '/', as in "example.com/job".
// A value is one line of text of at most [MaxLabelValue] bytes, and may be empty.
func ValidateLabel(name, value string) error {
	if problem := labelProblem(name, value); problem != "" {
		return &ValidationError{Fields: []FieldError{{Field: "label", Problem: problem}}}
	}
	return nil
}

func labelProblem(name, value string) string {
	prefix, base, ok := strings.Cut(name, "/")
	if !ok {
		prefix, base = "", name
	}
	switch {
	case len(base) > MaxLabelName || len(prefix) > maxLabelPrefix:
		return fmt.Sprintf("%.20q... is too long; the name of a label has at most %d characters", name, MaxLabelName)
	case !madeOf(base, letters+digits, "._-") || ok && !madeOf(prefix, lowerCase+digits, ".-"):
		return fmt.Sprintf("%q is not the name of a label; use letters, digits, and '.', '_', '-' inside", name)
	case len(value) > MaxLabelValue:
		return fmt.Sprintf("the value of %s has %d bytes; at most %d are allowed", name, len(value), MaxLabelValue)
	case !utf8.ValidString(value) || strings.ContainsFunc(value, func(r rune) bool { return !unicode.IsPrint(r) }):
		return fmt.Sprintf("the value of %s is not one line of plain text", name)
	}
	return ""
}
