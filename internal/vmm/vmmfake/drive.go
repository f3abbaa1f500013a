package vmmfake

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"syscall"

	"github.com/smolvm/smolvm/internal/vmm"
)

// drive is a disk with its chain of files, as a guest sees it: what the top file has not,
// the next one has. All that is written goes to the top. Of the formats this is what the
// project makes: raw files, and qcow2 with clusters of 64 KiB and refcounts of 16 bits; see
// QEMU's docs/interop/qcow2.
type drive struct {
	config vmm.Drive
	cpu    *cpu
	// halt is called when the disk can't be written, and returns when that is to be tried
	// again.
	halt func(error)

	mu     sync.Mutex // guards the following
	layers []*layer   // the top first
	size   int64
}

// layer is one file of a chain.
type layer struct {
	file *os.File
	raw  bool
	size int64
	l1   []uint64 // offsets of the tables of clusters, of a qcow2 file
	l1At int64
	end  int64 // of the file
}

const (
	clusterSize = 64 << 10
	perTable    = clusterSize / 8
	// offsetMask takes an offset out of an entry, and copied says in one that nothing else
	// uses the cluster.
	offsetMask = 0x00fffffffffffe00
	copied     = 1 << 63
)

func openDrive(config vmm.Drive) (*drive, error) {
	d := &drive{config: config}
	top, err := openLayer(config.Path, config.Format, !config.ReadOnly)
	if err != nil {
		return nil, err
	}
	d.layers, d.size = []*layer{top}, top.size
	for _, file := range config.Backing {
		below, err := openLayer(file.Path, file.Format, false)
		if err != nil {
			return nil, err
		}
		d.layers = append(d.layers, below)
	}
	return d, nil
}

func openLayer(path, format string, write bool) (*layer, error) {
	mode := os.O_RDONLY
	if write {
		mode = os.O_RDWR
	}
	file, err := os.OpenFile(path, mode, 0)
	if err != nil {
		return nil, err
	}
	end, err := file.Seek(0, io.SeekEnd)
	if err != nil {
		return nil, err
	}
	l := &layer{file: file, raw: format == "raw", size: end, end: end}
	if l.raw {
		return l, nil
	}
	header := make([]byte, 104)
	if _, err := file.ReadAt(header, 0); err != nil || string(header[:4]) != "QFI\xfb" {
		return nil, fmt.Errorf("%s is no qcow2 disk (%w)", path, err)
	}
	be := binary.BigEndian
	if bits := be.Uint32(header[20:]); bits != 16 {
		return nil, fmt.Errorf("%s has clusters of %d bits", path, bits)
	}
	l.size, l.l1At = int64(be.Uint64(header[24:])), int64(be.Uint64(header[40:]))
	l.l1 = make([]uint64, be.Uint32(header[36:]))
	for n := range l.l1 {
		if l.l1[n], err = l.entry(l.l1At + 8*int64(n)); err != nil {
			return nil, err
		}
	}
	l.end = (l.end + clusterSize - 1) / clusterSize * clusterSize
	return l, nil
}

func (l *layer) entry(at int64) (uint64, error) {
	var b [8]byte
	_, err := l.file.ReadAt(b[:], at)
	return binary.BigEndian.Uint64(b[:]), err
}

func (l *layer) setEntry(at int64, value uint64) error {
	var b [8]byte
	binary.BigEndian.PutUint64(b[:], value)
	_, err := l.file.WriteAt(b[:], at)
	return err
}

// find returns where the file has a cluster of the disk; zero if it has it not.
func (l *layer) find(cluster int64) (int64, error) {
	if cluster/perTable >= int64(len(l.l1)) {
		return 0, nil
	}
	table := int64(l.l1[cluster/perTable] & offsetMask)
	if table == 0 {
		return 0, nil
	}
	at, err := l.entry(table + 8*(cluster%perTable))
	return int64(at & offsetMask), err
}

// add gives the file a cluster of the disk, which holds data.
func (l *layer) add(cluster int64, data []byte) error {
	n := cluster / perTable
	if n >= int64(len(l.l1)) {
		return fmt.Errorf("cluster %d is beyond the end of the disk", cluster)
	}
	if l.l1[n] == 0 {
		at, err := l.allocate(make([]byte, clusterSize))
		if err == nil {
			err = l.setEntry(l.l1At+8*n, uint64(at)|copied)
		}
		if err != nil {
			return err
		}
		l.l1[n] = uint64(at) | copied
	}
	at, err := l.allocate(data)
	if err != nil {
		return err
	}
	return l.setEntry(int64(l.l1[n]&offsetMask)+8*(cluster%perTable), uint64(at)|copied)
}

// allocate puts a cluster at the end of the file. Only the first table of refcounts is
// kept, which is enough for 2 GiB.
func (l *layer) allocate(data []byte) (at int64, err error) {
	at = l.end
	if _, err := l.file.WriteAt(data, at); err != nil {
		return 0, err
	}
	table, err := l.entry(clusterSize)
	if err != nil {
		return 0, err
	}
	number := at / clusterSize
	if number >= clusterSize/2 {
		return 0, errors.New("the disk is too large for a fake VMM")
	}
	if _, err := l.file.WriteAt([]byte{0, 1}, int64(table)+2*number); err != nil {
		return 0, err
	}
	l.end += clusterSize
	return at, nil
}

// readCluster reads a cluster from the layers, the first of which is the top.
func readCluster(layers []*layer, cluster int64) ([]byte, error) {
	data := make([]byte, clusterSize)
	for _, l := range layers {
		at := cluster * clusterSize
		if !l.raw {
			found, err := l.find(cluster)
			if err != nil {
				return nil, err
			}
			if found == 0 {
				continue
			}
			at = found
		}
		if _, err := l.file.ReadAt(data, at); err != nil && !errors.Is(err, io.EOF) {
			return nil, err
		}
		return data, nil
	}
	return data, nil
}

// ReadAt implements [io.ReaderAt].
func (d *drive) ReadAt(p []byte, offset int64) (n int, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for n < len(p) && offset < d.size {
		data, err := readCluster(d.layers, offset/clusterSize)
		if err != nil {
			return n, err
		}
		data = data[offset%clusterSize:]
		data = data[:min(int64(len(data)), d.size-offset)]
		copied := copy(p[n:], data)
		n, offset = n+copied, offset+int64(copied)
	}
	if n < len(p) {
		err = io.EOF
	}
	return n, err
}

// WriteAt implements [io.WriterAt]. As with a real one, a host without room is no error of
// the guest's: it is held until there is.
func (d *drive) WriteAt(p []byte, offset int64) (int, error) {
	if d.config.ReadOnly {
		return 0, syscall.EROFS
	}
	for {
		// The guest runs while it writes: who saves it waits.
		d.cpu.steps.RLock()
		err := d.write(p, offset)
		d.cpu.steps.RUnlock()
		if !errors.Is(err, syscall.ENOSPC) {
			return len(p), err
		}
		d.halt(err)
	}
}

func (d *drive) write(p []byte, offset int64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if offset+int64(len(p)) > d.size {
		return io.ErrShortWrite
	}
	top := d.layers[0]
	for len(p) > 0 {
		cluster, within := offset/clusterSize, offset%clusterSize
		piece := p[:min(int64(len(p)), clusterSize-within)]
		if err := d.writePiece(top, cluster, within, piece); err != nil {
			return err
		}
		p, offset = p[len(piece):], offset+int64(len(piece))
	}
	return nil
}

func (d *drive) writePiece(top *layer, cluster, within int64, piece []byte) error {
	if top.raw {
		_, err := top.file.WriteAt(piece, cluster*clusterSize+within)
		return err
	}
	at, err := top.find(cluster)
	if err != nil {
		return err
	}
	if at != 0 {
		_, err := top.file.WriteAt(piece, at+within)
		return err
	}
	data, err := readCluster(d.layers, cluster)
	if err != nil {
		return err
	}
	copy(data[within:], piece)
	return top.add(cluster, data)
}

// sync has all that was written on stable storage.
func (d *drive) sync() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.config.ReadOnly {
		return nil
	}
	return d.layers[0].file.Sync()
}

// overlay makes what is written go to another file from now on.
func (d *drive) overlay(path string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	top, err := openLayer(path, "qcow2", true)
	if err != nil {
		return err
	}
	d.layers = append([]*layer{top}, d.layers...)
	d.config.Format = "qcow2"
	return nil
}

// checkOverlay reports whether overlay can succeed.
func checkOverlay(path string) error {
	l, err := openLayer(path, "qcow2", true)
	if err != nil {
		return err
	}
	return l.file.Close()
}
