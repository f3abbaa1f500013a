package manager_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/testenv"
)

const driveSize = 1 << 20

// qcow2Header is what a guest writes to make its disk look like a qcow2 disk of
// driveSize. With backing, reads come from that file of the host; with data, reads and
// writes go to it.
func qcow2Header(backing, data string) []byte {
	const cluster = 1 << 16
	image := make([]byte, 5*cluster)
	be := binary.BigEndian
	copy(image, "QFI\xfb")
	be.PutUint32(image[4:], 3)
	be.PutUint32(image[20:], 16)
	be.PutUint64(image[24:], driveSize)
	be.PutUint32(image[36:], 1)         // entries of the L1 table,
	be.PutUint64(image[40:], 3*cluster) // which is here
	be.PutUint64(image[48:], 1*cluster) // refcount table
	be.PutUint32(image[56:], 1)
	be.PutUint32(image[96:], 4)
	be.PutUint32(image[100:], 104)
	at := 104
	extension := func(kind uint32, text string) {
		be.PutUint32(image[at:], kind)
		be.PutUint32(image[at+4:], uint32(len(text)))
		copy(image[at+8:], text)
		at += 8 + (len(text)+7)/8*8
	}
	if data != "" {
		be.PutUint64(image[72:], 1<<2) // incompatible feature: external data file
		be.PutUint64(image[88:], 1<<1) // autoclear feature: it is raw
		extension(0x44415441, data)
		// All of the disk is there, at its place.
		be.PutUint64(image[3*cluster:], 1<<63|4*cluster)
		for i := range driveSize / cluster {
			be.PutUint64(image[4*cluster+8*i:], 1<<63|uint64(i)*cluster)
		}
	}
	if backing != "" {
		extension(0xe2792aca, "raw")
		at += 8
		be.PutUint64(image[8:], uint64(at))
		be.PutUint32(image[16:], uint32(len(backing)))
		copy(image[at:], backing)
	}
	be.PutUint64(image[1*cluster:], 2*cluster)
	for i := range 5 {
		be.PutUint16(image[2*cluster+2*i:], 1)
	}
	return image
}

// A guest writes a header into its raw drive by which another file of the host would be
// read, or written to, by the next VM with that drive. It gets what it has written, and
// no more; and that a disk looks like qcow2 must be said by who brings it (S1).
func TestHeadersOfGuestsAreNotFollowed(t *testing.T) {
	t.Parallel()
	m := openReal(t)
	dir := tempDir(t)
	secret := filepath.Join(dir, "secret")
	const text = "a secret file of the host"
	if err := os.WriteFile(secret, append([]byte(text), make([]byte, driveSize-len(text))...), 0o600); err != nil {
		t.Fatal(err)
	}
	headers := map[string]string{"backing": string(qcow2Header(secret, "")), "data": string(qcow2Header("", secret))}
	var drives []smolvm.Drive
	paths := map[string]string{}
	names := []string{"backing", "data"}
	for _, name := range names {
		paths[name] = filepath.Join(dir, name+".img")
		if err := os.WriteFile(paths[name], make([]byte, driveSize), 0o600); err != nil {
			t.Fatal(err)
		}
		drives = append(drives, smolvm.Drive{Path: paths[name]})
	}
	vm := mustRun(t, m, smolvm.VMConfig{ID: "writer", Drives: drives})
	for i, name := range names {
		write := smolvm.Command{
			Args:  []string{"dd", "of=/dev/vd" + string(rune('b'+i)), "bs=64k", "conv=notrunc,fsync"},
			Stdin: strings.NewReader(headers[name]),
		}
		if status, err := m.Exec(t.Context(), vm.ID, write); err != nil || !status.Success() {
			t.Fatalf("write a header: %v, %v", status, err)
		}
	}
	if _, err := m.Stop(t.Context(), vm.ID, smolvm.StopOptions{}); err != nil {
		t.Fatal(err)
	}
	// The same VM goes on with what it has written.
	if _, err := m.Start(t.Context(), vm.ID, smolvm.StartOptions{}); err != nil {
		t.Fatal(err)
	}
	for i, name := range names {
		device := "/dev/vd" + string(rune('b'+i))
		if got := sh(t, m, vm.ID, "head -c 3 "+device); got != "QFI" {
			t.Errorf("the drive with a %s file begins with %q, not with the header that was written", name, got)
		}
		if got := sh(t, m, vm.ID, "grep -c '"+text+"' "+device+" || true"); got != "0" {
			t.Errorf("the drive with a %s file shows the secret", name)
		}
		sh(t, m, vm.ID, "printf overwritten | dd of="+device+" conv=notrunc,fsync 2>/dev/null")
	}
	if got, err := os.ReadFile(secret); err != nil || !strings.HasPrefix(string(got), text) {
		t.Errorf("the secret is %.30q now, %v", got, err)
	}
	if err := m.Delete(t.Context(), vm.ID, smolvm.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}

	// Other VMs: nothing is guessed, and qcow2 that leads elsewhere is refused.
	for _, name := range names {
		if err := os.WriteFile(paths[name], []byte(headers[name]), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	kernel, initrd := testenv.Kernel(t), testenv.Image(t).InitrdPath
	for i, test := range []struct {
		file   string
		format smolvm.DiskFormat
		want   string
	}{
		{"backing", "", "looks like qcow2"},
		{"data", "", "looks like qcow2"},
		{"backing", smolvm.FormatQCOW2, "is based on another file"},
		{"data", smolvm.FormatQCOW2, "keeps its data in another file"},
		{"data", "vmdk", "is not known"},
	} {
		for _, mode := range []smolvm.DiskMode{smolvm.DiskIsolated, smolvm.DiskShared} {
			_, err := m.Create(t.Context(), smolvm.VMConfig{
				ID: fmt.Sprintf("root-%d-%s", i, mode), KernelPath: kernel, InitrdPath: initrd, DiskMode: mode,
				RootfsPath: paths[test.file], RootfsFormat: test.format,
			}, smolvm.CreateOptions{})
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("%s root %s as %q: %v, want %q", mode, test.file, test.format, err, test.want)
			}
		}
		for _, readOnly := range []bool{false, true} {
			_, err := m.Create(t.Context(), smolvm.VMConfig{
				ID: fmt.Sprintf("drive-%d-%v", i, readOnly), Drives: []smolvm.Drive{{Path: paths[test.file], Format: test.format, ReadOnly: readOnly}},
			}, smolvm.CreateOptions{})
			if invalid := (*smolvm.ValidationError)(nil); !errors.As(err, &invalid) || !strings.Contains(err.Error(), test.want) {
				t.Errorf("drive %s as %q: %v, want %q", test.file, test.format, err, test.want)
			}
		}
	}
}

// A disk may be smaller than the root file system that an image has for others, and grow
// (M4).
func TestSmallDisk(t *testing.T) {
	t.Parallel()
	m := openReal(t)
	ctx := t.Context()
	if _, err := m.Create(ctx, smolvm.VMConfig{DiskSizeMiB: 8}, smolvm.CreateOptions{}); err == nil || !strings.Contains(err.Error(), "use at least") {
		t.Errorf("a disk that is too small: %v", err)
	}
	vm := mustRun(t, m, smolvm.VMConfig{ID: "small", DiskSizeMiB: 1 << 10})
	size := func() int {
		t.Helper()
		mebibytes, err := strconv.Atoi(sh(t, m, vm.ID, "df -m / | awk 'END { print $2 }'"))
		if err != nil {
			t.Fatal(err)
		}
		return mebibytes
	}
	if got := size(); got < 900 || got > 1<<10 {
		t.Errorf("the file system has %d MiB on a disk of 1 GiB", got)
	}
	sh(t, m, vm.ID, "dd if=/dev/zero of=/root/file bs=1M count=300 2>/dev/null; echo kept >/root/k")
	if _, err := m.Stop(ctx, vm.ID, smolvm.StopOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := m.Resize(ctx, vm.ID, smolvm.ResizeOptions{DiskSizeMiB: 2 << 10}); err != nil {
		t.Fatal(err)
	}
	if _, err := m.Start(ctx, vm.ID, smolvm.StartOptions{}); err != nil {
		t.Fatal(err)
	}
	if got := size(); got < 1900 || got > 2<<10 {
		t.Errorf("the file system has %d MiB on a disk of 2 GiB", got)
	}
	if got := sh(t, m, vm.ID, "cat /root/k; stat -c %s /root/file"); got != "kept\n314572800" {
		t.Errorf("after it was grown the guest says %q", got)
	}
}

// The disk of a VM whose root file system is based on other files of the user's can be a drive
// of another VM, also when it was retained: then the user names the files again.
func TestDriveBasedOnUsersFiles(t *testing.T) {
	m := openFake(t)
	ctx := t.Context()
	dir := tempDir(t)
	base, top := filepath.Join(dir, "base.img"), filepath.Join(dir, "top.qcow2")
	content := make([]byte, driveSize)
	copy(content[0x438:], "\x53\xef") // looks like ext4 to a probe
	if err := os.WriteFile(base, content, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(top, qcow2Header(base, ""), 0o600); err != nil {
		t.Fatal(err)
	}
	images, err := m.Images(ctx)
	if err != nil || len(images) != 1 {
		t.Fatalf("images are %v, %v", images, err)
	}
	below := []smolvm.DiskFile{{Path: base, Format: smolvm.FormatRaw}}
	owner := mustCreate(t, m, smolvm.VMConfig{
		ID: "owner", RetainDisk: true, KernelPath: images[0].KernelPath, RootfsPath: top, RootfsFormat: smolvm.FormatQCOW2, RootfsBacking: below,
	})
	all := append([]smolvm.DiskFile{{Path: top, Format: smolvm.FormatQCOW2}}, below...)
	start := func(id string, backing []smolvm.DiskFile) error {
		t.Helper()
		drive := smolvm.Drive{Path: owner.DiskPath, Format: smolvm.FormatQCOW2, ReadOnly: true, Backing: backing}
		if _, err := m.Create(ctx, smolvm.VMConfig{ID: id, Drives: []smolvm.Drive{drive}}, smolvm.CreateOptions{}); err != nil {
			return err
		}
		_, err := m.Start(ctx, id, smolvm.StartOptions{})
		return errors.Join(err, m.Delete(ctx, id, smolvm.DeleteOptions{}))
	}
	if err := start("other", nil); err != nil {
		t.Errorf("a VM with the disk of another: %v", err)
	}
	if err := start("named", all); err == nil || !strings.Contains(err.Error(), "what it is based on is known") {
		t.Errorf("a VM's disk with files that are known: %v", err)
	}
	if err := m.Delete(ctx, owner.ID, smolvm.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	for _, backing := range [][]smolvm.DiskFile{nil, below, all[:1], {all[0], {Path: top, Format: smolvm.FormatQCOW2}}} {
		if err := start("wrong", backing); err == nil || !strings.Contains(smolvm.HintOf(err), "backing=") {
			t.Errorf("a retained disk with %v: %v, hint %q", backing, err, smolvm.HintOf(err))
		}
	}
	if err := start("retained", all); err != nil {
		t.Errorf("a VM with a retained disk: %v", err)
	}
	if err := os.Remove(owner.DiskPath); err != nil {
		t.Error(err)
	}
}
