// Command standin stands in for Firecracker in a jail: it says what it finds there and what it
// can do, makes a file, and waits for the end of its standard input.
package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// seen is what is said, as a line of JSON.
type seen struct {
	UID, GID, PID int
	Args          []string
	Capabilities  []string
	Dir           string
	Names         []string
	Read          map[string]string // contents of files, or errors
	Write         map[string]string // "" or an error
	Devices       map[string]string
	TAP           string
}

func run() error {
	s := seen{UID: os.Getuid(), GID: os.Getgid(), PID: os.Getpid(), Args: os.Args[1:],
		Read: map[string]string{}, Write: map[string]string{}, Devices: map[string]string{}}
	s.Dir, _ = os.Getwd()
	var header unix.CapUserHeader
	header.Version = unix.LINUX_CAPABILITY_VERSION_3
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return err
	}
	s.Capabilities = []string{fmt.Sprintf("%x", data[0].Permitted), fmt.Sprintf("%x", data[0].Inheritable)}
	entries, err := os.ReadDir(".")
	if err != nil {
		return err
	}
	for _, entry := range entries {
		s.Names = append(s.Names, entry.Name())
	}
	for _, name := range []string{"kernel", "drive0", "drive1", "../../../../etc/passwd"} {
		text, err := os.ReadFile(name)
		s.Read[name] = string(text[:min(len(text), 11)])
		if err != nil {
			s.Read[name] = err.Error()
		}
	}
	for _, name := range []string{"kernel", "drive0", "drive1", "saved-memory"} {
		s.Write[name] = ""
		if err := os.WriteFile(name, []byte("written"), 0o600); err != nil {
			s.Write[name] = err.Error()
		}
	}
	for _, name := range []string{"/dev/net/tun", "/dev/kvm"} {
		s.Devices[name] = ""
		file, err := os.OpenFile(name, os.O_RDWR, 0)
		if err != nil {
			s.Devices[name] = err.Error()
			continue
		}
		_ = file.Close()
	}
	s.TAP = openTAP()
	text, err := json.Marshal(s)
	if err != nil {
		return err
	}
	fmt.Println(string(text))
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}

// openTAP opens tap0 as Firecracker does, and returns the error.
func openTAP() string {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR, 0)
	if err != nil {
		return err.Error()
	}
	defer func() { _ = unix.Close(fd) }()
	request, err := unix.NewIfreq("tap0")
	if err != nil {
		return err.Error()
	}
	request.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, request); err != nil {
		return err.Error()
	}
	return ""
}
