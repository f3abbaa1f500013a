package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"

	"github.com/smolvm/smolvm"
)

// maxReaders is how many transactions of one process may read at the same time.
// Writers don't hold them up, nor the other way round.
const maxReaders = 4

// ErrNoneFree reports that all leases, or all host ports, are taken.
var ErrNoneFree = errors.New("none is free")

// Range is a range of integers, both ends included.
type Range struct{ First, Last int }

// upTo returns the range up to a number; 0: all of it.
func (r Range) upTo(last int) Range {
	if last > 0 {
		r.Last = min(r.Last, last)
	}
	return r
}

// Options are the options of a [Store]. The zero value is the one to use outside of tests.
type Options struct {
	// Now is the clock. Nil: [time.Now].
	Now func() time.Time
	// Leases are the indexes to give out. Zero: 2 to 65534, those that package
	// network can turn into addresses.
	Leases Range
	// Ports are the host ports to choose from for SSH, and for forwards that leave
	// the choice open. Zero: 2200 to 65535.
	Ports Range
	// MakeRoom makes room on a disk that is full, and reports whether there is more now:
	// what could not be written is tried again then. Nil: there is none to be made.
	MakeRoom func() bool
}

func (o Options) withDefaults() Options {
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Leases == (Range{}) {
		o.Leases = Range{2, 65534}
	}
	if o.Ports == (Range{}) {
		o.Ports = Range{2200, 65535}
	}
	return o
}

// Store is an open state database. Its methods may be called by any number of
// goroutines. An error of any of them matches [smolvm.ErrDatabaseCorrupt] if the
// database can't be read.
type Store struct {
	path string
	root string // the directory that paths in it are relative to
	opts Options
	read *sql.DB
	// write has a single connection: SQLite has one writer at a time, and to queue
	// here is fairer than SQLite's own busy timeout.
	write *sql.DB

	mu       sync.Mutex
	prepared map[string]*sql.Stmt // guarded by mu: statements of read, by their text
}

// Open opens the database at path, makes it if it is missing, and brings it to the
// newest schema. Any number of processes may do so at the same time. The directory
// must exist.
//
// The error matches [smolvm.ErrDatabaseTooNew] or [smolvm.ErrDatabaseCorrupt]; the
// file is left as it was then.
func Open(ctx context.Context, path string, opts Options) (*Store, error) {
	steps, err := migrations()
	if err != nil {
		return nil, err
	}
	return open(ctx, path, opts, steps)
}

func open(ctx context.Context, path string, opts Options, steps []string) (*Store, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, fmt.Errorf("open state database: %w", err)
	}
	if err := makeFile(path); err != nil {
		return nil, fmt.Errorf("open state database: %w", err)
	}
	s := &Store{path: path, root: filepath.Dir(path), opts: opts.withDefaults(), prepared: map[string]*sql.Stmt{}}
	// sql.Open only looks at the driver's name: it can't fail here.
	if s.read, err = sql.Open("sqlite", dsn(path, "deferred", "query_only(1)")); err != nil {
		return nil, err
	}
	if s.write, err = sql.Open("sqlite", dsn(path, "immediate", "synchronous(NORMAL)")); err != nil {
		return nil, err
	}
	s.read.SetMaxOpenConns(maxReaders)
	s.read.SetMaxIdleConns(maxReaders)
	s.write.SetMaxOpenConns(1)
	if err := s.withRoom(func() error { return s.migrate(ctx, steps) }); err != nil {
		return nil, errors.Join(s.explain(err), s.Close())
	}
	return s, nil
}

// makeFile makes an empty file, which is an empty database, unless there is a file.
// SQLite would make it readable for everybody, and there are private keys in it.
func makeFile(path string) error {
	// Not by open and close: a process that closes any descriptor of a file loses
	// all its POSIX locks on it, and with them those that SQLite has if the
	// process has opened the database twice.
	err := unix.Mknod(path, unix.S_IFREG|0o600, 0)
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return &fs.PathError{Op: "create", Path: path, Err: err}
	}
	return nil
}

// dsn names the database and the settings of each connection to it. The journal
// mode is not among them, as the file itself keeps it.
func dsn(path, lock, pragma string) string {
	query := url.Values{"_txlock": {lock}, "_pragma": {"busy_timeout(10000)", "foreign_keys(1)", pragma}}
	return (&url.URL{Scheme: "file", Path: path, RawQuery: query.Encode()}).String()
}

// Path returns the path of the database file.
func (s *Store) Path() string { return s.path }

// Close closes the database. Closing it again does nothing.
func (s *Store) Close() error {
	return errors.Join(s.read.Close(), s.write.Close())
}

// view runs f in a transaction that sees one state of the database throughout.
func (s *Store) view(ctx context.Context, f func(tx *sql.Tx) error) error {
	return s.explain(s.withRoom(func() error { return transact(ctx, s.read, &sql.TxOptions{ReadOnly: true}, f) }))
}

// query reads the rows that a single statement finds; the statement is a transaction of its
// own. It is prepared once, as that takes longer than running it.
func (s *Store) query(ctx context.Context, text string, scan func(*sql.Rows) error, args ...any) error {
	return s.explain(s.withRoom(func() error {
		statement, err := s.prepare(ctx, text)
		if err != nil {
			return err
		}
		rows, err := statement.QueryContext(ctx, args...)
		if err != nil {
			return err
		}
		return errors.Join(scan(rows), rows.Close())
	}))
}

// prepare returns a prepared statement for reading. Closing the store closes it.
func (s *Store) prepare(ctx context.Context, text string) (*sql.Stmt, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if statement := s.prepared[text]; statement != nil {
		return statement, nil
	}
	statement, err := s.read.PrepareContext(ctx, text)
	if err == nil {
		s.prepared[text] = statement
	}
	return statement, err
}

// update runs f in a transaction that no other writer can come between.
func (s *Store) update(ctx context.Context, f func(tx *sql.Tx) error) error {
	return s.explain(s.withRoom(func() error { return transact(ctx, s.write, nil, f) }))
}

// AwaitWriters returns when whoever was writing when it was called has done so, so that what is
// read next has it, or has given up.
func (s *Store) AwaitWriters(ctx context.Context) error {
	return s.update(ctx, func(*sql.Tx) error { return nil }) // there is one writer at a time
}

// withRoom calls do, which may need room on the disk, and calls it again if the disk was full
// and some room could be made.
// Even reading takes a file: the index of the write-ahead log.
func (s *Store) withRoom(do func() error) error {
	for {
		err := do()
		switch resultCode(err) & 0xff {
		case sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN:
			if s.opts.MakeRoom != nil && s.opts.MakeRoom() {
				continue
			}
		}
		return err
	}
}

// updateDurably runs f as update does. What f writes, and all that was written before,
// survives a power cut once updateDurably has returned; waiting for the disk takes some
// milliseconds.
func (s *Store) updateDurably(ctx context.Context, f func(tx *sql.Tx) error) error {
	return s.explain(s.withRoom(func() error {
		conn, err := s.write.Conn(ctx)
		if err != nil {
			return err
		}
		defer func() { _ = conn.Close() }()
		// In WAL mode, NORMAL leaves it to the next checkpoint.
		if _, err := conn.ExecContext(ctx, "PRAGMA synchronous = FULL"); err != nil {
			return err
		}
		err = transact(ctx, conn, nil, f)
		// If this fails, the connection goes on as it is, which is slower and no worse.
		_, _ = conn.ExecContext(context.WithoutCancel(ctx), "PRAGMA synchronous = NORMAL")
		return err
	}))
}

// beginner is a database, or one connection of it.
type beginner interface {
	BeginTx(ctx context.Context, opts *sql.TxOptions) (*sql.Tx, error)
}

func transact(ctx context.Context, db beginner, opts *sql.TxOptions, f func(tx *sql.Tx) error) error {
	tx, err := db.BeginTx(ctx, opts)
	if err != nil {
		return err
	}
	if err = f(tx); err != nil {
		_ = tx.Rollback() // f's error says more; an unfinished transaction is void in any case
	} else {
		err = tx.Commit()
	}
	// A transaction ends with its context, in the middle of anything.
	if ctx.Err() != nil && (errors.Is(err, sql.ErrTxDone) || resultCode(err)&0xff == sqlite3.SQLITE_INTERRUPT) {
		return context.Cause(ctx)
	}
	return err
}

// explain says which database SQLite has trouble with, and what can be done.
func (s *Store) explain(err error) error {
	switch resultCode(err) & 0xff { // the low byte is the kind of error
	case sqlite3.SQLITE_OK:
		return err // not SQLite's
	case sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT:
		return fmt.Errorf("%w: %s: %w; move it away, with any files named like it that end in -wal and -shm, "+
			"to begin with an empty one: the VMs' disks are not touched", smolvm.ErrDatabaseCorrupt, s.path, err)
	case sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM:
		return fmt.Errorf("state database %s: %w; both the file and its directory must be readable and writable", s.path, err)
	case sqlite3.SQLITE_FULL:
		return fmt.Errorf("state database %s: %w; make room on that disk, as by removing VMs", s.path, err)
	default:
		return fmt.Errorf("state database %s: %w", s.path, err)
	}
}

// resultCode returns SQLite's extended result code; 0 if err is not SQLite's.
func resultCode(err error) int {
	if e, ok := errors.AsType[*sqlite.Error](err); ok {
		return e.Code()
	}
	return sqlite3.SQLITE_OK
}
