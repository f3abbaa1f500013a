package vmmfake

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/smolvm/smolvm/internal/agent/wire"
)

// programMark begins the file of a program that is one of programs.
const programMark = "\x7fvmmfake "

// programs are those of a guest: as much of each as tests need. What the shell has of its
// own, such as echo and test, is not here but where it may be run without a shell.
var programs map[string]func(*process) int

func init() { //nolint:gochecknoinits // the shell is one of them, and looks them up
	programs = map[string]func(*process) int{
		"sh": runShell, "true": func(*process) int { return 0 }, "false": func(*process) int { return 1 },
		"awk": awk, "cat": cat, "cut": cut, "cp": cp, "chmod": chmod, "date": date, "dd": dd, "echo": echo, "env": env, "grep": grep,
		"head": head, "hostname": hostname, "httpd": httpd, "ip": ip, "kill": kill, "ln": ln, "ls": ls, "mkdir": mkdir, "mount": mount,
		"mv": mv, "nproc": nproc, "od": od, "pidof": pidof, "ping": ping, "ps": ps, "rm": rm, "sha256sum": sha256sum,
		"sleep": sleep, "stat": stat, "sync": syncFiles, "touch": touch, "tr": tr, "uname": uname, "wc": wc,
		"poweroff": func(p *process) int { p.guest.powerOff(""); return 0 },
		"reboot":   func(p *process) int { p.guest.reboot(); return 0 },
		"id":       func(p *process) int { _, _ = fmt.Fprintln(p.stdout, "uid=0(root) gid=0(root)"); return 0 },
	}
}

// options splits arguments into single letters, with their values if they take one, and the
// rest.
func (p *process) options(withValue string) (options map[string]string, rest []string) {
	options = map[string]string{}
	for i := 1; i < len(p.args); i++ {
		arg := p.args[i]
		if len(arg) < 2 || arg[0] != '-' {
			rest = append(rest, arg)
			continue
		}
		for n, letter := range arg[1:] {
			if !strings.ContainsRune(withValue, letter) {
				options[string(letter)] = ""
				continue
			}
			value := arg[1+n+1:]
			if value == "" && i+1 < len(p.args) {
				i++
				value = p.args[i]
			}
			options[string(letter)] = value
			break
		}
	}
	return options, rest
}

// inputs opens the files that are named, or the standard input.
func (p *process) inputs(names []string) (io.Reader, error) {
	if len(names) == 0 {
		return p.stdin, nil
	}
	var readers []io.Reader
	for _, name := range names {
		file, err := p.guest.open(p.path(name), os.O_RDONLY, 0)
		if err != nil {
			return nil, err
		}
		readers = append(readers, file)
	}
	return io.MultiReader(readers...), nil
}

func runShell(p *process) int {
	args := p.args[1:]
	for len(args) > 0 && strings.HasPrefix(args[0], "-") && args[0] != "-c" {
		args = args[1:]
	}
	switch {
	case len(args) > 1 && args[0] == "-c":
		return p.script(args[1], append(args[2:len(args):len(args)], "")[:max(1, len(args)-2)])
	case len(args) > 0:
		text, err := p.guest.files.read(p.path(args[0]))
		if err != nil {
			return p.fail(err)
		}
		return p.script(string(text), args)
	}
	text, err := io.ReadAll(p.stdin)
	if err != nil {
		return p.fail(err)
	}
	return p.script(string(text), []string{"sh"})
}

func echo(p *process) int {
	args, end := p.args[1:], "\n"
	if len(args) > 0 && args[0] == "-n" {
		args, end = args[1:], ""
	}
	_, _ = fmt.Fprint(p.stdout, strings.Join(args, " ")+end)
	return 0
}

func cat(p *process) int {
	_, names := p.options("")
	code := 0
	for _, name := range append(names, make([]string, max(0, 1-len(names)))...) {
		in, err := p.inputs(slices.DeleteFunc([]string{name}, func(n string) bool { return n == "" || n == "-" }))
		if err == nil {
			_, err = io.Copy(p.stdout, in)
		}
		if err != nil {
			code = p.fail(err)
		}
	}
	return code
}

func head(p *process) int {
	options, names := p.options("nc")
	in, err := p.inputs(names)
	if err != nil {
		return p.fail(err)
	}
	if bytes, ok := options["c"]; ok {
		n, err := strconv.ParseInt(bytes, 10, 64)
		if err == nil {
			_, err = io.CopyN(p.stdout, in, n)
		}
		if err != nil && !errors.Is(err, io.EOF) {
			return p.fail(err)
		}
		return 0
	}
	lines := 10
	if text, ok := options["n"]; ok {
		lines, _ = strconv.Atoi(text)
	}
	scanner := bufio.NewScanner(in)
	for range lines {
		if !scanner.Scan() {
			break
		}
		_, _ = fmt.Fprintln(p.stdout, scanner.Text())
	}
	return 0
}

func wc(p *process) int {
	options, names := p.options("")
	in, err := p.inputs(names)
	if err != nil {
		return p.fail(err)
	}
	text, err := io.ReadAll(in)
	if err != nil {
		return p.fail(err)
	}
	var counts []string
	for _, one := range []struct {
		option string
		count  int
	}{{"l", bytes.Count(text, []byte("\n"))}, {"w", len(bytes.Fields(text))}, {"c", len(text)}} {
		if _, ok := options[one.option]; ok || len(options) == 0 {
			counts = append(counts, strconv.Itoa(one.count))
		}
	}
	_, _ = fmt.Fprintln(p.stdout, strings.Join(append(counts, names...), " "))
	return 0
}

func grep(p *process) int {
	options, rest := p.options("")
	if len(rest) == 0 {
		return 2
	}
	pattern, err := regexp.Compile(rest[0])
	if err != nil {
		return 2
	}
	in, err := p.inputs(rest[1:])
	if err != nil {
		return p.fail(err) + 1
	}
	count := 0
	_, quiet := options["q"]
	_, counting := options["c"]
	for scanner := bufio.NewScanner(in); scanner.Scan(); {
		if !pattern.Match(scanner.Bytes()) {
			continue
		}
		if count++; !quiet && !counting {
			_, _ = fmt.Fprintln(p.stdout, scanner.Text())
		}
	}
	if counting {
		_, _ = fmt.Fprintln(p.stdout, count)
	}
	if count == 0 {
		return 1
	}
	return 0
}

// awk prints one field of the lines that match: /PATTERN/ { print $N }.
func awk(p *process) int {
	var pattern string
	var field int
	if len(p.args) < 2 {
		return 2
	}
	if _, err := fmt.Sscanf(strings.NewReplacer("/", " ").Replace(p.args[1]), " %s { print $%d }", &pattern, &field); err != nil {
		p.say("awk: this is not one of the few programs that are understood here")
		return 2
	}
	matches, err := regexp.Compile(pattern)
	if err != nil {
		return 2
	}
	return p.lines(p.args[2:], func(line string) {
		if fields := strings.Fields(line); matches.MatchString(line) && field > 0 && field <= len(fields) {
			_, _ = fmt.Fprintln(p.stdout, fields[field-1])
		}
	})
}

// cut prints one field of each line.
func cut(p *process) int {
	options, names := p.options("df")
	field, err := strconv.Atoi(options["f"])
	if err != nil {
		return p.fail(err)
	}
	return p.lines(names, func(line string) {
		if fields := strings.Split(line, options["d"]); field > 0 && field <= len(fields) {
			_, _ = fmt.Fprintln(p.stdout, fields[field-1])
		}
	})
}

// lines calls do for each line of the inputs.
func (p *process) lines(names []string, do func(line string)) int {
	for i, name := range names {
		names[i] = p.path(name)
	}
	in, err := p.inputs(names)
	if err != nil {
		return p.fail(err)
	}
	for scanner := bufio.NewScanner(in); scanner.Scan(); {
		do(scanner.Text())
	}
	return 0
}

func tr(p *process) int {
	options, sets := p.options("")
	text, err := io.ReadAll(p.stdin)
	if err != nil || len(sets) == 0 {
		return 1
	}
	unescape := strings.NewReplacer(`\n`, "\n", `\0`, "\x00", `\t`, "\t")
	from := unescape.Replace(sets[0])
	to := ""
	if len(sets) > 1 {
		to = unescape.Replace(sets[1])
	}
	if from == "a-z" && to == "A-Z" {
		_, _ = p.stdout.Write(bytes.ToUpper(text))
		return 0
	}
	_, remove := options["d"]
	out := bytes.Map(func(r rune) rune {
		i := strings.IndexRune(from, r)
		switch {
		case i < 0:
			return r
		case remove || to == "":
			return -1
		}
		return rune(to[min(i, len(to)-1)])
	}, text)
	_, _ = p.stdout.Write(out)
	return 0
}

func od(p *process) int { // as with -An -tx1
	text, _ := io.ReadAll(p.stdin)
	_, _ = fmt.Fprintf(p.stdout, " % x\n", text)
	return 0
}

func sha256sum(p *process) int {
	in, err := p.inputs(p.args[1:])
	if err != nil {
		return p.fail(err)
	}
	sum := sha256.New()
	if _, err := io.Copy(sum, in); err != nil {
		return p.fail(err)
	}
	_, _ = fmt.Fprintf(p.stdout, "%x  -\n", sum.Sum(nil))
	return 0
}

func dd(p *process) int {
	in, out, block, count := p.stdin, p.stdout, int64(512), int64(-1)
	for _, arg := range p.args[1:] {
		name, value, _ := strings.Cut(arg, "=")
		var err error
		switch name {
		case "if":
			in, err = p.guest.open(p.path(value), os.O_RDONLY, 0)
		case "of":
			out, err = p.guest.open(p.path(value), os.O_WRONLY|os.O_CREATE, 0o644)
		case "bs":
			digits, mega := strings.CutSuffix(value, "M")
			if block, err = strconv.ParseInt(digits, 10, 64); mega {
				block <<= 20
			}
		case "count":
			count, err = strconv.ParseInt(value, 10, 64)
		}
		if err != nil {
			return p.fail(err)
		}
	}
	if count >= 0 {
		in = io.LimitReader(in, block*count)
	}
	if _, err := io.Copy(out, in); err != nil {
		return p.fail(err)
	}
	return 0
}

func sleep(p *process) int {
	if len(p.args) < 2 {
		return 1
	}
	seconds, err := strconv.ParseFloat(p.args[1], 64)
	if err != nil {
		return p.fail(err)
	}
	end := p.guest.uptime() + time.Duration(seconds*float64(time.Second))
	for left := end - p.guest.uptime(); left > 0; left = end - p.guest.uptime() {
		select {
		case <-time.After(left):
			p.guest.machine.cpu.step() // the guest's clock stands still while it is held
		case <-p.ctx.Done():
			return 1
		}
	}
	return 0
}

func kill(p *process) int { // of the shell itself only: there is no list of processes
	p.say("kill: there are no processes that could be named")
	return 1
}

func date(p *process) int {
	now := p.guest.now()
	if len(p.args) > 1 && p.args[1] == "+%s" {
		_, _ = fmt.Fprintln(p.stdout, now.Unix())
		return 0
	}
	_, _ = fmt.Fprintln(p.stdout, now.UTC().Format(time.UnixDate))
	return 0
}

func env(p *process) int {
	for _, entry := range p.env {
		_, _ = fmt.Fprintln(p.stdout, entry)
	}
	return 0
}

func hostname(p *process) int {
	hello := p.guest.current()
	if hello == nil {
		_, _ = fmt.Fprintln(p.stdout, "(none)")
		return 0
	}
	_, _ = fmt.Fprintln(p.stdout, hello.Hostname)
	return 0
}

func uname(p *process) int { _, _ = fmt.Fprintln(p.stdout, "Linux 6.1.0-vmmfake"); return 0 }

func nproc(p *process) int { _, _ = fmt.Fprintln(p.stdout, p.guest.machine.Config.VCPUs); return 0 }

func ps(p *process) int { _, _ = fmt.Fprintln(p.stdout, "PID USER COMMAND\n1 root init"); return 0 }

func pidof(*process) int { return 1 }

func syncFiles(p *process) int {
	if err := p.guest.sync(); err != nil {
		return p.fail(err)
	}
	return 0
}

func ls(p *process) int {
	_, names := p.options("")
	if len(names) == 0 {
		names = []string{"."}
	}
	for _, name := range names {
		found, err := p.guest.files.list(p.path(name))
		if err != nil {
			return p.fail(err)
		}
		for _, one := range found {
			_, _ = fmt.Fprintln(p.stdout, one.Name())
		}
	}
	return 0
}

func rm(p *process) int {
	options, names := p.options("")
	_, force := options["f"]
	code := 0
	for _, name := range names {
		if err := p.guest.files.remove(p.path(name)); err != nil && !force {
			code = p.fail(err)
		}
	}
	return code
}

func mkdir(p *process) int {
	options, names := p.options("m")
	for _, name := range names {
		if _, parents := options["p"]; parents {
			p.guest.files.mkdirAll(p.path(name))
			continue
		}
		if _, err := p.guest.files.stat(p.path(name), true); err == nil {
			return p.fail(&fs.PathError{Path: name, Err: fs.ErrExist})
		}
		if err := p.guest.files.put(p.path(name), node{Mode: fs.ModeDir | 0o755}); err != nil {
			return p.fail(err)
		}
	}
	return 0
}

func touch(p *process) int {
	for _, name := range p.args[1:] {
		if _, err := p.guest.open(p.path(name), os.O_WRONLY|os.O_CREATE, 0o644); err != nil {
			return p.fail(err)
		}
	}
	return 0
}

func chmod(p *process) int {
	if len(p.args) < 3 {
		return 1
	}
	mode, err := strconv.ParseUint(p.args[1], 8, 32)
	for _, name := range p.args[2:] {
		changeErr := p.guest.files.change(p.path(name), func(n *node) {
			if err != nil { // "+x"
				n.Mode |= 0o111
				return
			}
			n.Mode = n.Mode.Type() | fs.FileMode(mode)
		})
		if changeErr != nil {
			return p.fail(changeErr)
		}
	}
	return 0
}

func mv(p *process) int {
	if len(p.args) != 3 {
		return 1
	}
	if err := p.guest.files.rename(p.path(p.args[1]), p.path(p.args[2])); err != nil {
		return p.fail(err)
	}
	return 0
}

func cp(p *process) int {
	if len(p.args) != 3 {
		return 1
	}
	text, err := p.guest.files.read(p.path(p.args[1]))
	if err == nil {
		err = p.guest.files.put(p.path(p.args[2]), node{Mode: 0o644, Data: text})
	}
	if err != nil {
		return p.fail(err)
	}
	return 0
}

func ln(p *process) int {
	if _, names := p.options(""); len(names) == 2 {
		if err := p.guest.files.put(p.path(names[1]), node{Mode: fs.ModeSymlink | 0o777, Link: names[0]}); err == nil {
			return 0
		}
	}
	return 1
}

func stat(p *process) int { // as with -c %s
	info, err := p.guest.files.stat(p.path(p.args[len(p.args)-1]), true)
	if err != nil {
		return p.fail(err)
	}
	_, _ = fmt.Fprintln(p.stdout, info.Size())
	return 0
}

// mount adds the files of a drive to a directory.
func mount(p *process) int {
	if len(p.args) != 3 {
		return 1
	}
	letter, found := strings.CutPrefix(p.args[1], "/dev/vd")
	if !found || len(letter) != 1 || int(letter[0]-'a') >= len(p.guest.machine.drives) {
		return p.fail(&fs.PathError{Path: p.args[1], Err: fs.ErrNotExist})
	}
	if err := p.guest.mount(p.guest.machine.drives[letter[0]-'a'], p.path(p.args[2])); err != nil {
		return p.fail(err)
	}
	return 0
}

// ip configures the interface: "ip addr add ADDRESS dev eth0".
func ip(p *process) int {
	if len(p.args) != 6 || p.args[2] != "add" {
		return 0 // it is up anyway
	}
	address, err := netip.ParsePrefix(p.args[3])
	if err == nil {
		err = p.guest.network.adopt(wire.Network{
			MAC: p.guest.machine.Config.NIC.MAC, MTU: p.guest.machine.Config.NIC.MTU, Address: address, Gateway: address.Masked().Addr(),
		}, p.guest.serveTCP)
	}
	if err != nil {
		return p.fail(err)
	}
	return 0
}

// ping sends requests until it is ended: "ping -c COUNT -q ADDRESS".
func ping(p *process) int {
	address, err := netip.ParseAddr(p.args[len(p.args)-1])
	for err == nil {
		if err = p.guest.network.ping(address); err == nil {
			select {
			case <-time.After(100 * time.Millisecond):
			case <-p.ctx.Done():
				return 1
			}
		}
	}
	return p.fail(err)
}

// httpd serves the files of a directory until the guest ends, as busybox's does, which
// goes on when its parent ends.
func httpd(p *process) int {
	options, _ := p.options("ph")
	port, err := strconv.Atoi(options["p"])
	if err != nil {
		return p.fail(err)
	}
	dir := p.path(options["h"])
	if err := p.guest.network.serveHTTP(context.Background(), port, func(name string) ([]byte, error) {
		return p.guest.files.read(path.Join(dir, name))
	}); err != nil {
		return p.fail(err)
	}
	return 0
}
