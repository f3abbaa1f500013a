package guest

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/agent/wire"
)

// job is a command that is to run, or runs.
type job struct {
	argv []string
	arg0 string // what the command is told to be called, if not argv[0]
	env  []string
	dir  string
	user account
	tty  *wire.TTY

	// namespaces are those that the command gets of its own: flags of clone(2).
	namespaces uintptr

	noStdin bool
	// mortal: when its client goes away, all that the command has started ends with it,
	// and not only its process group.
	mortal         bool
	stdin          io.Reader
	stdout, stderr io.Writer

	mu       sync.Mutex // guards ended and group
	ended    bool
	pid      int
	group    *cgroup  // holds all that the command starts; nil if there are no cgroups
	groups   *cgroups // where group goes back to
	terminal *os.File // our end of the pseudo-terminal
	status   <-chan unix.WaitStatus
	output   sync.WaitGroup
	sources  []*os.File // our ends of what the command writes to
	sink     *os.File   // our end of what it reads from
}

// errNotFound reports that the command is not there.
var errNotFound = errors.New("command not found")

// start starts the command in a session, and so a process group, of its own.
func (j *job) start(r *reaper) error {
	path, err := lookPath(j.argv[0], j.env, j.dir)
	if err != nil {
		return err
	}
	argv := j.argv
	if j.arg0 != "" {
		argv = append([]string{j.arg0}, argv[1:]...)
	}
	attr := &syscall.ProcAttr{
		Dir: j.dir,
		Env: j.env,
		Sys: &syscall.SysProcAttr{Setsid: true, Credential: j.user.credential(), Cloneflags: j.namespaces},
	}
	theirs, err := j.connect(attr.Sys)
	if err != nil {
		return err
	}
	for _, file := range theirs {
		attr.Files = append(attr.Files, file.Fd())
	}
	j.groups, j.group = &r.groups, r.groups.take()
	if r.servesFiles != nil && r.servesFiles() {
		err = j.launch(r, path, argv, attr)
	} else {
		j.pid, j.status, err = r.start(func() (int, error) { return j.fork(path, argv, attr) })
	}
	closeDistinct(theirs)
	if err != nil {
		j.over()
		j.disconnect()
		return explainExec(err, j.argv[0], path, j.dir, j.user)
	}
	j.pump()
	return nil
}

// fork starts the command in its group, or without one if the kernel refuses that.
func (j *job) fork(path string, argv []string, attr *syscall.ProcAttr) (int, error) {
	if j.group != nil {
		attr.Sys.UseCgroupFD, attr.Sys.CgroupFD = true, j.group.fd()
		pid, err := syscall.ForkExec(path, argv, attr)
		switch {
		case errors.Is(err, unix.ENOSYS), errors.Is(err, unix.EINVAL): // no clone3, or not into groups
		case errors.Is(err, unix.ENODEV), errors.Is(err, unix.EBUSY), errors.Is(err, unix.EOPNOTSUPP): // somebody has changed the group
		default:
			return pid, err
		}
		j.group.close()
		j.group, attr.Sys.UseCgroupFD = nil, false
	}
	return syscall.ForkExec(path, argv, attr)
}

// connect makes the command's three standard streams; it returns its ends.
func (j *job) connect(sys *syscall.SysProcAttr) ([]*os.File, error) {
	if j.tty != nil {
		ours, theirs, err := openTerminal(j.tty, j.user)
		if err != nil {
			return nil, fmt.Errorf("open terminal: %w", err)
		}
		j.terminal, j.sink, j.sources = ours, ours, []*os.File{ours}
		sys.Setctty = true
		return []*os.File{theirs, theirs, theirs}, nil
	}
	var theirs []*os.File
	fail := func(err error) ([]*os.File, error) {
		closeDistinct(theirs)
		j.disconnect()
		return nil, fmt.Errorf("open pipe: %w", err)
	}
	if j.noStdin {
		null, err := os.Open(os.DevNull)
		if err != nil {
			return fail(err)
		}
		theirs = append(theirs, null)
	} else {
		read, write, err := os.Pipe()
		if err != nil {
			return fail(err)
		}
		theirs, j.sink = append(theirs, read), write
	}
	for range 2 {
		read, write, err := os.Pipe()
		if err != nil {
			return fail(err)
		}
		theirs, j.sources = append(theirs, write), append(j.sources, read)
	}
	return theirs, nil
}

func (j *job) disconnect() {
	closeDistinct(append(j.sources, j.sink))
}

func closeDistinct(files []*os.File) {
	for i, file := range files {
		if file != nil && (i == 0 || file != files[i-1]) {
			_ = file.Close()
		}
	}
}

// pump copies between the command and its client.
func (j *job) pump() {
	if j.sink != nil {
		go func() {
			if j.terminal != nil {
				keys := j.stdin
				if j.noStdin {
					keys = strings.NewReader("")
				}
				typeIn(j.terminal, keys)
				return
			}
			_, _ = io.Copy(j.sink, j.stdin)
			_ = j.sink.Close()
		}()
	}
	for i, source := range j.sources {
		to := j.stdout
		if i == 1 {
			to = j.stderr
		}
		j.output.Go(func() { _, _ = io.Copy(to, source) })
	}
}

// wait returns when the command has ended and what it wrote has been passed on. It
// does not wait for processes that the command has left behind, though they may
// hold its output open.
func (j *job) wait() unix.WaitStatus {
	status := <-j.status
	j.over()
	for _, source := range j.sources {
		// Ends a read that waits; what is there already is read below.
		_ = source.SetReadDeadline(longAgo)
	}
	j.output.Wait()
	for i, source := range j.sources {
		to := j.stdout
		if i == 1 {
			to = j.stderr
		}
		drain(source, to)
	}
	j.disconnect()
	return status
}

// drain copies what can be read from a file without waiting.
func drain(file *os.File, to io.Writer) {
	if file.SetReadDeadline(noDeadline) != nil {
		return
	}
	raw, err := file.SyscallConn()
	if err != nil {
		return
	}
	buf := make([]byte, 16<<10)
	for {
		n := 0
		// True: never wait, as the file does not block.
		err := raw.Read(func(fd uintptr) bool {
			n, err = unix.Read(int(fd), buf)
			return true
		})
		if err != nil || n <= 0 {
			return
		}
		if _, err := to.Write(buf[:n]); err != nil {
			return
		}
	}
}

// over notes that the command has ended. Its process id and its group may be another's
// from now on.
func (j *job) over() {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.ended = true
	j.groups.put(j.group)
	j.group = nil
}

// signal sends signals to all processes of the command's group, and kills all that it
// has started if it is told to.
func (j *job) signal(all bool, signals ...unix.Signal) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.ended {
		return
	}
	for _, sig := range signals {
		_ = unix.Kill(-j.pid, sig)
	}
	if all {
		j.group.kill()
	}
}

// breakPipe ends the reading of what the command writes, so that it gets SIGPIPE.
func (j *job) breakPipe() {
	if j.terminal == nil {
		_ = j.sources[0].Close()
	}
}

func (j *job) resize(columns, rows uint32) {
	if j.terminal != nil {
		_ = setSize(j.terminal, columns, rows)
	}
}

// lookPath finds a command as execvp does, by the PATH that it will have.
func lookPath(name string, env []string, dir string) (string, error) {
	if strings.Contains(name, "/") {
		return name, nil
	}
	path := defaultPath
	for _, entry := range env {
		if value, ok := strings.CutPrefix(entry, "PATH="); ok {
			path = value
		}
	}
	denied := false
	for _, folder := range filepath.SplitList(path) {
		if folder == "" {
			folder = "."
		}
		if !filepath.IsAbs(folder) {
			folder = filepath.Join(dir, folder)
		}
		candidate := filepath.Join(folder, name)
		info, err := os.Stat(candidate)
		if err != nil || info.IsDir() {
			continue
		}
		if info.Mode()&0o111 != 0 {
			return candidate, nil
		}
		denied = true
	}
	if denied {
		return "", fmt.Errorf("%s: %w", name, fs.ErrPermission)
	}
	return "", fmt.Errorf("%s: %w", name, errNotFound)
}

// explainExec says which of the files that a start involves is at fault. name is the
// command as it was asked for, path where it was found.
func explainExec(err error, name, path, dir string, user account) error {
	if info, statErr := os.Stat(dir); dir != "" && (statErr != nil || !info.IsDir()) {
		return fmt.Errorf("working directory %s: no such directory", dir)
	}
	if errors.Is(err, fs.ErrNotExist) {
		if _, statErr := os.Stat(path); statErr == nil {
			return fmt.Errorf("%s: its interpreter is missing: %w", name, errNotFound)
		}
		return fmt.Errorf("%s: %w", name, errNotFound)
	}
	if errors.Is(err, fs.ErrPermission) && user.uid != 0 {
		return fmt.Errorf("%s in %s as %s: %w", name, dir, user.name, err)
	}
	return fmt.Errorf("%s: %w", name, err)
}
