package guest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/agent/layertar"
)

// The places of a workspace. The guest's root file system is in lowerDir, as the kernel refuses
// an overlay whose upper directory is within a lower one; layers are directories with numbers
// from 1 on, each with what it changed, and what the kernel works with, in it.
const (
	workspaceDir = "/.smolvm-workspace"
	lowerDir     = "lower"
	upperName    = "u"
	workName     = "w"
	stubsName    = "stubs"
	mergedDir    = workspaceDir + "/merged"
	areasDir     = workspaceDir + "/areas"
	// memoryAreasDir is in a file system in memory.
	memoryAreasDir = "/run/smolvm-areas"
)

// maxLayers is how many layers a workspace may have: Linux takes 500 lower directories, and
// their names have to fit into a page.
const maxLayers = 400

// exitSetup is the exit status of an operation that could not be done, as docker run has it.
const exitSetup = 125

// workspaceMain does one operation of a workspace. A step's command takes the place of the
// program.
func workspaceMain(text string, args []string) int {
	var order workspaceOrder
	err := json.Unmarshal([]byte(text), &order)
	if err == nil {
		err = order.run(args)
	}
	if err == nil {
		return 0
	}
	fmt.Fprintln(os.Stderr, "smolvm: "+err.Error())
	switch {
	case errors.Is(err, errNotFound):
		return exitNotFound
	case errors.Is(err, errNotRun):
		return exitNotRun
	}
	return exitSetup
}

func (o workspaceOrder) run(args []string) error {
	ctx := context.Background() // whoever gives it up kills the program
	switch {
	case o.Root != nil:
		return o.sendRoot(ctx)
	case o.Overlay != "":
		if !isName(o.Overlay) {
			return fmt.Errorf("%q is no name of an overlay", o.Overlay)
		}
		return layertar.Write(ctx, os.Stdout, filepath.Join(overlaysDir, o.Overlay, upperName), layertar.Options{Upper: true})
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("part from the mounts of others: %w", err)
	}
	if err := openWorkspace(); err != nil {
		return err
	}
	switch {
	case o.Step != nil:
		return o.step(args)
	case o.Layer != nil && o.Layer.Area != "":
		dir, err := findArea(o.Layer.Area)
		if err != nil {
			return err
		}
		return layertar.Write(ctx, os.Stdout, dir, layertar.Options{})
	case o.Layer != nil:
		return sendLayer(ctx, o.Layer.Discard)
	case o.Put != nil && o.Put.Area != "":
		return o.putArea(ctx)
	case o.Put != nil:
		return o.put(ctx)
	}
	return errors.New("the workspace is asked for nothing that this agent knows")
}

// openWorkspace makes the guest's root file system the lowest layer of a workspace, unless that
// was done. What is in it is renamed, not copied. A guest in which that was cut short is of
// no use any more.
func openWorkspace() error {
	if _, err := os.Stat(filepath.Join(workspaceDir, "1")); err == nil {
		return nil
	}
	// In a mount of its own, as others are mounted in the root.
	root := filepath.Join(workspaceDir, "root")
	for _, dir := range []string{workspaceDir, root, mergedDir, areasDir} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			return fmt.Errorf("make a workspace of the guest: %w", err)
		}
	}
	if err := unix.Mount("/", root, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("make a workspace of the guest: mount its root file system: %w", err)
	}
	lower := filepath.Join(root, workspaceDir, lowerDir)
	if err := moveRoot(root, lower); err != nil {
		return fmt.Errorf("make a workspace of the guest: %w", err)
	}
	return makeLayer(1)
}

// moveRoot moves what is in a root file system to a directory of it.
func moveRoot(root, lower string) error {
	if err := os.Mkdir(lower, 0o755); err != nil {
		return err
	}
	entries, err := os.ReadDir(root)
	if err != nil {
		return err
	}
	for _, entry := range entries {
		from, to := filepath.Join(root, entry.Name()), filepath.Join(lower, entry.Name())
		switch "/" + entry.Name() {
		case workspaceDir, "/lost+found":
			continue
		}
		err := os.Rename(from, to)
		if errors.Is(err, unix.EBUSY) { // something is mounted there
			err = moveMountPoint(from, to)
		}
		if err != nil {
			return err
		}
	}
	return copyOwnerAndMode(root, lower)
}

// moveMountPoint makes a directory like one that can't be moved, and moves what is in it.
func moveMountPoint(from, to string) error {
	if err := os.Mkdir(to, 0o700); err != nil {
		return err
	}
	entries, err := os.ReadDir(from)
	if err != nil {
		return err
	}
	for _, entry := range entries {
		if err := os.Rename(filepath.Join(from, entry.Name()), filepath.Join(to, entry.Name())); err != nil {
			return err
		}
	}
	return copyOwnerAndMode(from, to)
}

// layerDir is where a layer is.
func layerDir(number int) string { return filepath.Join(workspaceDir, strconv.Itoa(number)) }

func makeLayer(number int) error {
	if number > maxLayers {
		return fmt.Errorf("there are more than %d layers in the workspace; make an image of them, and go on from that", maxLayers)
	}
	// Under its name when it is whole: it is what the last layer is known by.
	temp := filepath.Join(workspaceDir, "new")
	if err := os.MkdirAll(temp, 0o755); err != nil {
		return err
	}
	if err := os.Mkdir(filepath.Join(temp, upperName), 0o755); err != nil && !os.IsExist(err) {
		return err
	}
	below := filepath.Join(workspaceDir, lowerDir)
	if number > 1 {
		below = filepath.Join(layerDir(number-1), upperName)
	}
	if err := copyOwnerAndMode(below, filepath.Join(temp, upperName)); err != nil {
		return err
	}
	return os.Rename(temp, layerDir(number))
}

// currentLayer returns the number of the layer that is being made.
func currentLayer() (int, error) {
	entries, err := os.ReadDir(workspaceDir)
	if err != nil {
		return 0, err
	}
	number := 0
	for _, entry := range entries {
		if n, err := strconv.Atoi(entry.Name()); err == nil {
			number = max(number, n)
		}
	}
	if number == 0 {
		return 0, errors.New("the workspace has no layer")
	}
	return number, nil
}

// mountMerged mounts the overlay of all layers. It is volatile, as the guest is: nothing waits for
// the disk.
func mountMerged(number int) error {
	if err := os.Chdir(workspaceDir); err != nil {
		return err
	}
	work := filepath.Join(layerDir(number), workName)
	// An overlay that was volatile leaves there what keeps others from being mounted.
	if err := errors.Join(os.RemoveAll(work), os.Mkdir(work, 0o755)); err != nil {
		return err
	}
	var lowers []string
	for n := number - 1; n > 0; n-- {
		lowers = append(lowers, strconv.Itoa(n)+"/"+upperName) // short, as all have to fit into a page
	}
	lowers = append(lowers, lowerDir)
	current := strconv.Itoa(number)
	data := overlayOptions(strings.Join(lowers, ":"), current+"/"+upperName, current+"/"+workName) + ",volatile"
	if err := unix.Mount("overlay", mergedDir, "overlay", 0, data); err != nil {
		return fmt.Errorf("mount an overlay of %d layers: %w", number, err)
	}
	return os.Chdir("/")
}

// sendLayer sends what has changed since the last layer, and begins another one if something
// has. With discard it sends nothing.
func sendLayer(ctx context.Context, discard bool) error {
	number, err := currentLayer()
	if err != nil {
		return err
	}
	if err := removeStubs(number); err != nil {
		return err
	}
	upper := filepath.Join(layerDir(number), upperName)
	skip := func(path string) layertar.Skip {
		// They are mounted in every step, and say nothing of what it did.
		if slices.Contains(kernelDirs(), "/"+path) {
			return layertar.Content
		}
		return layertar.Nothing
	}
	if !discard {
		if err := layertar.Write(ctx, os.Stdout, upper, layertar.Options{Upper: true, Skip: skip, Replace: withoutAuthority}); err != nil {
			return err
		}
	}
	entries, err := os.ReadDir(upper)
	if err != nil || len(entries) == 0 {
		return err
	}
	return makeLayer(number + 1)
}

// put unpacks an archive in the root file system of steps.
func (o workspaceOrder) put(ctx context.Context) error {
	number, err := currentLayer()
	if err != nil {
		return err
	}
	if err := mountMerged(number); err != nil {
		return err
	}
	return extractAt(ctx, mergedDir, string(o.Put.Path))
}

// extractAt unpacks an archive in a directory of a root, which is made if it is not there.
func extractAt(ctx context.Context, root, path string) error {
	inner, err := makeDirIn(root, path)
	if err != nil {
		return fmt.Errorf("%q: %w", path, err)
	}
	defer func() { _ = inner.Close() }()
	return layertar.Extract(ctx, os.Stdin, "/proc/self/fd/"+strconv.Itoa(int(inner.Fd())))
}

func isName(name string) bool {
	return name != "" && len(name) <= 64 && strings.Trim(name, "abcdefghijklmnopqrstuvwxyz0123456789-") == ""
}

// findArea returns where an area is.
func findArea(name string) (string, error) {
	if !isName(name) {
		return "", fmt.Errorf("%q is no name of an area", name)
	}
	for _, dir := range []string{areasDir, memoryAreasDir} {
		path := filepath.Join(dir, name)
		if _, err := os.Stat(path); err == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("there is no area %q: %w", name, fs.ErrNotExist)
}

// putArea fills an area, or removes it.
func (o workspaceOrder) putArea(ctx context.Context) error {
	path, err := findArea(o.Put.Area)
	if o.Put.Drop {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return errors.Join(err, os.RemoveAll(path))
	}
	if errors.Is(err, fs.ErrNotExist) {
		dir := areasDir
		if o.Put.Memory {
			dir = memoryAreasDir
		}
		path = filepath.Join(dir, o.Put.Area)
		err = os.MkdirAll(path, 0o755)
	}
	if err != nil {
		return err
	}
	return extractAt(ctx, path, string(o.Put.Path))
}

// errNotRun marks the error of a command that is there and can't be started.
var errNotRun = errors.New("the command can't be run")

// execute replaces this program by a command.
func execute(args, env []string, dir string, user account) error {
	path, err := lookPath(args[0], env, dir)
	if err != nil {
		return err
	}
	err = explainExec(syscall.Exec(path, args, env), args[0], path, dir, user)
	if errors.Is(err, errNotFound) {
		return err
	}
	return fmt.Errorf("%w: %w", errNotRun, err)
}
