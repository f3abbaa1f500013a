// Command transfer is what a guest runs to have its network tested. It asks the name server that
// is its argument for a name, over UDP and TCP, and says if there was an answer. Then, on TCP port 7 it takes a
// letter and a length: of "s" it reads as many bytes and answers with their SHA-256, of "g" it
// sends as many and their SHA-256. On UDP port 7 it sends back what it gets.
package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"time"
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
	for _, protocol := range []string{"udp4", "tcp4"} {
		if err := ask(protocol, net.JoinHostPort(os.Args[1], "53")); err != nil {
			fail(err)
		}
		fmt.Println("transfer: answered over", protocol)
	}
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

// ask sends the question for the address of localhost, until there is an answer.
func ask(protocol, server string) error {
	question := []byte("\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x09localhost\x00\x00\x01\x00\x01")
	if protocol == "tcp4" {
		question = append(binary.BigEndian.AppendUint16(nil, uint16(len(question))), question...)
	}
	var err error
	for range 30 {
		if err = askOnce(protocol, server, question); err == nil {
			return nil
		}
	}
	return err
}

func askOnce(protocol, server string, question []byte) error {
	conn, err := net.DialTimeout(protocol, server, time.Second)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	_ = conn.SetDeadline(time.Now().Add(time.Second))
	if _, err := conn.Write(question); err != nil {
		return err
	}
	answer := make([]byte, 512)
	n, err := conn.Read(answer)
	if err == nil && !bytes.Contains(answer[:n], question[len(question)-15:]) {
		err = fmt.Errorf("unexpected answer %x", answer[:n])
	}
	return err
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
