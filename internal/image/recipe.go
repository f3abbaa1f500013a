package image

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/flock"
)

// recipeVersion changes whenever the same ingredients make another image.
const recipeVersion = 6

// Recipe says how to build an image.
type Recipe struct {
	// Name that will mean the image.
	Name string
	// Agent is the program that the guest runs first.
	Agent string
	// Kernel is a kernel file, with its modules in ModulesDir. Empty: from the
	// distribution's packages.
	Kernel, ModulesDir string
	// KernelName stands for Kernel where it is said what an image was made of, and changes with what
	// is in it: an image stays as it is when the file is elsewhere. Empty: its path, size and time.
	KernelName string
	// Rootfs is a disk image with a file system, or a directory. Empty: busybox,
	// from the distribution's packages.
	Rootfs string
	// Force builds even if an image of this recipe is there.
	Force bool
	// Progress is told of each phase; it may be nil.
	Progress func(smolvm.Progress)
}

func (r Recipe) say(phase string, done, total int64) {
	if r.Progress != nil {
		r.Progress(smolvm.Progress{Phase: phase, Done: done, Total: total})
	}
}

func (r Recipe) validate() error {
	if !isName(r.Name) {
		return fmt.Errorf("name %q of an image: use a-z, 0-9, and '.', '_', '-' inside, at most 64 characters", r.Name)
	}
	if r.ModulesDir != "" && r.Kernel == "" {
		return errors.New("modules are for a kernel: give both, or none")
	}
	for _, file := range []struct{ what, path string }{
		{"agent", r.Agent}, {"kernel", r.Kernel}, {"modules", r.ModulesDir}, {"root file system", r.Rootfs},
	} {
		if file.path == "" {
			continue
		}
		if _, err := os.Stat(file.path); err != nil {
			return fmt.Errorf("%s: %w", file.what, err)
		}
	}
	return r.validateFiles()
}

// validateFiles looks into the files of a recipe, before anything is fetched for them.
func (r Recipe) validateFiles() error {
	if r.Kernel != "" {
		if _, err := formOf(r.Kernel); err != nil {
			return fmt.Errorf("kernel %w", err)
		}
	}
	if r.Rootfs != "" {
		if err := checkRootfs(r.Rootfs); err != nil {
			return fmt.Errorf("root file system: %w", err)
		}
	}
	return nil
}

// key names all that a recipe is made of.
func (r Recipe) key(agentHash string) (string, error) {
	var files [3]string
	for i, path := range []string{r.Kernel, r.ModulesDir, r.Rootfs} {
		if path == "" {
			continue
		}
		if i == 0 && r.KernelName != "" {
			files[i] = r.KernelName
			continue
		}
		var err error
		if files[i], err = identifyAll(path); err != nil {
			return "", err
		}
	}
	text, err := json.Marshal(struct {
		Version     int
		Arch, Agent string
		Files       [3]string
	}{recipeVersion, runtime.GOARCH, agentHash, files})
	if err != nil {
		return "", err
	}
	return hashOf(text), nil
}

// fileID reports whether a file is the same as before, without reading it.
type fileID struct {
	Path    string `json:"path"`
	Size    int64  `json:"size"`
	ModTime int64  `json:"mtime_ns"`
}

func identify(path string) (fileID, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return fileID{}, err
	}
	info, err := os.Stat(path)
	if err != nil {
		return fileID{}, err
	}
	return fileID{Path: path, Size: info.Size(), ModTime: info.ModTime().UnixNano()}, nil
}

// identifyAll reports whether a file, or anything in a directory, is the same as
// before: a directory's own time says nothing of changes within its files.
func identifyAll(path string) (string, error) {
	path, err := filepath.EvalSymlinks(path)
	if err != nil {
		return "", err
	}
	if path, err = filepath.Abs(path); err != nil {
		return "", err
	}
	hash := sha256.New()
	err = filepath.WalkDir(path, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := entry.Info()
		if err != nil {
			return err
		}
		_, err = fmt.Fprintf(hash, "%q %s %d %d\n", path, info.Mode(), info.Size(), info.ModTime().UnixNano())
		return err
	})
	return hex.EncodeToString(hash.Sum(nil)), err
}

func hashOf(text []byte) string {
	sum := sha256.Sum256(text)
	return hex.EncodeToString(sum[:])
}

func hashFile(path string) (string, error) {
	file, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer func() { _ = file.Close() }()
	hash := sha256.New()
	if _, err := io.Copy(hash, file); err != nil {
		return "", err
	}
	return hex.EncodeToString(hash.Sum(nil)), nil
}

// Ensure returns the image that a name means if it was built by this recipe, and
// builds it otherwise.
func (s *Store) Ensure(ctx context.Context, recipe Recipe) (smolvm.Image, error) {
	if image, ok := s.current(recipe); ok {
		return image, nil
	}
	return s.Build(ctx, recipe)
}

// current finds the image of a recipe.
func (s *Store) current(recipe Recipe) (smolvm.Image, bool) {
	record, err := s.readName(recipe.Name)
	if err != nil {
		return smolvm.Image{}, false
	}
	agent, err := identify(recipe.Agent)
	if err != nil {
		return smolvm.Image{}, false
	}
	agentHash := record.AgentHash
	if agent != record.Agent {
		if agentHash, err = hashFile(recipe.Agent); err != nil {
			return smolvm.Image{}, false
		}
	}
	key, err := recipe.key(agentHash)
	if err != nil || key != record.Recipe {
		return smolvm.Image{}, false
	}
	image, err := s.describe(record.Digest)
	if err == nil && agent != record.Agent {
		s.rememberAgent(recipe.Name, record, agent)
	}
	return image, err == nil
}

// rememberAgent writes down that the agent of an image is at another place now, or has been
// touched, so that it need not be hashed each time. While an image is being built it leaves
// that to a later time.
func (s *Store) rememberAgent(name string, was nameRecord, agent fileID) {
	lock, err := s.openLock()
	if err != nil {
		return
	}
	defer func() { _ = lock.Close() }()
	if flock.TryLock(lock) != nil {
		return
	}
	if now, err := s.readName(name); err == nil && now == was {
		now.Agent = agent
		_ = s.writeName(name, now)
	}
}
