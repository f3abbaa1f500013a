// Command transfer is what a guest runs to have its network tested. On TCP port 7 it takes a
// letter and a length: of "s" it reads as many bytes and answers with their SHA-256, of "g" it
// sends as many and their SHA-256. On UDP port 7 it sends back what it gets.
package main

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
)

func main() {
	listener, err := net.Listen("tcp4", ":7")
	if err != nil {
		fail(err)
	}
	packets, err := net.ListenPacket("udp4", ":7")
	if err != nil {
		fail(err)
	}
	go echo(packets)
	fmt.Println("transfer: listening")
	for {
		conn, err := listener.Accept()
		if err != nil {
			fail(err)
		}
		if err := serve(conn); err != nil {
			fmt.Println("transfer:", err)
		}
	}
}

func fail(err error) {
	fmt.Println("transfer:", err)
	os.Exit(1)
}

func echo(packets net.PacketConn) {
	buffer := make([]byte, 1<<16)
	for {
		n, from, err := packets.ReadFrom(buffer)
		if err != nil {
			fail(err)
		}
		if _, err := packets.WriteTo(buffer[:n], from); err != nil {
			fmt.Println("transfer:", err)
		}
	}
}

func serve(conn net.Conn) error {
	defer func() { _ = conn.Close() }()
	var order struct {
		What  byte
		Bytes uint64
	}
	if err := binary.Read(conn, binary.BigEndian, &order); err != nil {
		return err
	}
	sum := sha256.New()
	var err error
	if order.What == 's' {
		_, err = io.CopyN(sum, conn, int64(order.Bytes))
	} else {
		random := rand.NewChaCha8([32]byte{})
		_, err = io.CopyN(io.MultiWriter(conn, sum), random, int64(order.Bytes))
	}
	if err != nil {
		return err
	}
	_, err = conn.Write(sum.Sum(nil))
	return err
}
