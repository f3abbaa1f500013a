package store

import (
	"database/sql/driver"
	"net/netip"
	"path/filepath"
	"time"

	"github.com/smolvm/smolvm/internal/datadir"
)

// The types of this file are fields of Go as columns of SQLite: NULL if the field
// has its zero value. They are written by Value and read by Scan, which may rely on
// the column's type, as the tables are STRICT.

// text is a string.
type text[T ~string] struct{ field *T }

func (t text[T]) Value() (driver.Value, error) {
	if *t.field == "" {
		return nil, nil
	}
	return string(*t.field), nil
}

func (t text[T]) Scan(value any) error {
	s, _ := value.(string)
	*t.field = T(s)
	return nil
}

// file is the path of a file, which is kept relative to the database's directory if it is
// below that: the directory may be moved, and copied.
type file struct {
	root  string
	field *string
}

func (f file) Value() (driver.Value, error) {
	name := datadir.Rel(f.root, *f.field)
	return text[string]{&name}.Value()
}

func (f file) Scan(value any) error {
	name, _ := value.(string)
	if name != "" && !filepath.IsAbs(name) {
		name = f.root + string(filepath.Separator) + name // it is clean, as Value has written it
	}
	*f.field = name
	return nil
}

// number is an integer.
type number[T ~int | ~int64 | ~uint64] struct{ field *T }

func (n number[T]) Value() (driver.Value, error) {
	if *n.field == 0 {
		return nil, nil
	}
	return int64(*n.field), nil
}

func (n number[T]) Scan(value any) error {
	i, _ := value.(int64)
	*n.field = T(i)
	return nil
}

// moment is a time, as nanoseconds since 1970.
type moment struct{ field *time.Time }

func (m moment) Value() (driver.Value, error) {
	if m.field.IsZero() {
		return nil, nil
	}
	return m.field.UnixNano(), nil
}

func (m moment) Scan(value any) error {
	*m.field = time.Time{}
	if ns, ok := value.(int64); ok {
		*m.field = time.Unix(0, ns).UTC()
	}
	return nil
}

// address is an IP address as text. Its column is never NULL.
type address struct{ field *netip.Addr }

func (a address) Value() (driver.Value, error) {
	if !a.field.IsValid() {
		return "", nil
	}
	return a.field.String(), nil
}

func (a address) Scan(value any) (err error) {
	*a.field = netip.Addr{}
	if s, _ := value.(string); s != "" {
		*a.field, err = netip.ParseAddr(s)
	}
	return err
}

// prefix is a network as text.
type prefix struct{ field *netip.Prefix }

func (p prefix) Value() (driver.Value, error) {
	if !p.field.IsValid() {
		return nil, nil
	}
	return p.field.String(), nil
}

func (p prefix) Scan(value any) (err error) {
	*p.field = netip.Prefix{}
	if s, _ := value.(string); s != "" {
		*p.field, err = netip.ParsePrefix(s)
	}
	return err
}
