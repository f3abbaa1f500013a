// Command hostile is a guest's agent that turns on its host: it answers the hello, and
// then does what its second argument says. Tests put it into an initramfs.
package main

import (
	"encoding/binary"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/agent/wire"
)

// frame is the header of a frame of yamux's.
func frame(kind byte, flags uint16, id, length uint32) []byte {
	b := make([]byte, 12, 12+length%(8<<10))
	b[1] = kind
	binary.BigEndian.PutUint16(b[2:], flags)
	binary.BigEndian.PutUint32(b[4:], id)
	binary.BigEndian.PutUint32(b[8:], length)
	return b
}

// modes are what it can do: the i-th piece of what it sends without end, reading nothing.
var modes = map[string]func(i uint32) []byte{
	"pings":   func(i uint32) []byte { return frame(2, 1, 0, i) },
	"streams": func(i uint32) []byte { return append(frame(0, 1, 2*i+2, 4096), make([]byte, 4096)...) },
	"noise":   func(i uint32) []byte { return []byte{byte(i), byte(i >> 8), 0x55} },
	"deaf":    nil,
}

func main() {
	if err := run(os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, "hostile:", err)
	}
	for {
		_ = unix.Pause() // as the end of PID 1 would be that of the VM
	}
}

func run(path, mode string) error {
	port, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	var hello wire.Hello
	if err := wire.Read(port, &hello); err != nil {
		return err
	}
	if err := wire.Write(port, wire.Answer{Version: mode}); err != nil {
		return err
	}
	next, known := modes[mode]
	if !known {
		return fmt.Errorf("no mode %q", mode)
	}
	if next == nil {
		return nil
	}
	return flood(port, next)
}

func flood(w io.Writer, next func(uint32) []byte) error {
	var block []byte
	for i := uint32(0); ; i++ {
		if block = append(block, next(i)...); len(block) < 32<<10 {
			continue
		}
		if _, err := w.Write(block); err != nil {
			return err
		}
		block = block[:0]
	}
}
