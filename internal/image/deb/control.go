package deb

import (
	"errors"
	"fmt"
	"regexp"
	"strings"
)

// Field is a field of a paragraph.
type Field struct {
	Name string
	// Value is what follows the colon, with the lines that continue it as they are.
	Value string
}

// Paragraph is a paragraph of control data, with its fields in order. See deb822(5).
type Paragraph []Field

// Get returns the value of a field, whatever the case of its name is; empty if there is none.
func (p Paragraph) Get(name string) string {
	for _, field := range p {
		if strings.EqualFold(field.Name, name) {
			return field.Value
		}
	}
	return ""
}

// String returns the paragraph as text, with the newline that ends it.
func (p Paragraph) String() string {
	var b strings.Builder
	for _, field := range p {
		b.WriteString(field.Name + ":")
		if field.Value != "" && field.Value[0] != '\n' {
			b.WriteByte(' ')
		}
		b.WriteString(field.Value + "\n")
	}
	return b.String()
}

// ParseParagraph reads a text that is one paragraph.
func ParseParagraph(text string) (Paragraph, error) {
	paragraphs, err := ParseParagraphs(text)
	if err == nil && len(paragraphs) != 1 {
		err = fmt.Errorf("has %d paragraphs, and not one", len(paragraphs))
	}
	if err != nil {
		return nil, err
	}
	return paragraphs[0], nil
}

// ParseParagraphs reads paragraphs, with empty lines between them.
func ParseParagraphs(text string) ([]Paragraph, error) {
	var all []Paragraph
	var current Paragraph
	for number, line := range strings.Split(text, "\n") {
		line = strings.TrimRight(line, " \t\r")
		switch {
		case line == "":
			if current != nil {
				all, current = append(all, current), nil
			}
		case line[0] == '#':
		case line[0] == ' ' || line[0] == '\t':
			if current == nil {
				return nil, fmt.Errorf("line %d continues no field", number+1)
			}
			current[len(current)-1].Value += "\n" + line
		default:
			name, value, ok := strings.Cut(line, ":")
			if !ok || !isFieldName(name) {
				return nil, fmt.Errorf("line %d is no field: %.60q", number+1, line)
			}
			if current.Get(name) != "" {
				return nil, fmt.Errorf("line %d: field %s is there twice", number+1, name)
			}
			current = append(current, Field{Name: name, Value: strings.TrimLeft(value, " \t")})
		}
	}
	if current != nil {
		all = append(all, current)
	}
	return all, nil
}

// isFieldName reports whether a field may have that name.
func isFieldName(name string) bool {
	return name != "" && !strings.ContainsFunc(name, func(r rune) bool { return r <= ' ' || r >= 0x7f })
}

var (
	nameForm    = regexp.MustCompile(`^[a-z0-9][a-z0-9+.-]+$`)
	versionForm = regexp.MustCompile(`^[0-9A-Za-z][0-9A-Za-z.+~:-]*$`)
	archForm    = regexp.MustCompile(`^[a-z0-9][a-z0-9-]*$`)
)

// IsName reports whether a package may have that name; see Debian's policy, 5.6.7.
func IsName(name string) bool { return len(name) <= 128 && nameForm.MatchString(name) }

// IsVersion reports whether a package may have that version.
func IsVersion(version string) bool { return len(version) <= 256 && versionForm.MatchString(version) }

// checkPackage checks what becomes part of file names and of dpkg's database.
func (p Paragraph) checkPackage() error {
	switch {
	case !IsName(p.Get("Package")):
		return fmt.Errorf("%.100q is no name of a package", p.Get("Package"))
	case !IsVersion(p.Get("Version")):
		return fmt.Errorf("%.100q is no version", p.Get("Version"))
	case !archForm.MatchString(p.Get("Architecture")):
		return fmt.Errorf("%.100q is no architecture", p.Get("Architecture"))
	case p.Get("Status") != "" || p.Get("Conffiles") != "":
		return errors.New("has fields that only dpkg's database has")
	}
	return nil
}

// SameInstance reports whether the package of another architecture can be installed beside it,
// by which dpkg names its files.
func (p Paragraph) SameInstance() bool { return p.Get("Multi-Arch") == "same" }
