package smolvm

import (
	"fmt"
	"regexp"
	"strings"
	"unicode"
	"unicode/utf8"
)

// labelPattern is the name of a label as in Kubernetes: a name, which may have a DNS
// name and a slash before it.
var labelPattern = regexp.MustCompile(`^([a-z0-9]([a-z0-9.-]*[a-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$`)

// maxLabelPrefix is the longest DNS name, in bytes (RFC 1035).
const maxLabelPrefix = 253

// ValidateLabel checks a label of a VM; the error is a [*ValidationError]. A name has
// letters and digits, with '.', '_' and '-' inside, at most [MaxLabelName] of them; it
// may have a DNS name and '/' before it, as in "example.com/job". A value is one line
// of text of at most [MaxLabelValue] bytes, and may be empty.
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
	case !labelPattern.MatchString(name):
		return fmt.Sprintf("%q is not the name of a label; use letters, digits, and '.', '_', '-' inside", name)
	case len(value) > MaxLabelValue:
		return fmt.Sprintf("the value of %s has %d bytes; at most %d are allowed", name, len(value), MaxLabelValue)
	case !utf8.ValidString(value) || strings.ContainsFunc(value, func(r rune) bool { return !unicode.IsPrint(r) }):
		return fmt.Sprintf("the value of %s is not one line of plain text", name)
	}
	return ""
}
