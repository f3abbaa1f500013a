package wire

import (
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strings"
	"unicode"
)

// The bounds of what the host takes from a guest. An agent stays far below; more is cut off where it
// is text for people, and refused where it is not. All of it goes to the database.
const (
	// maxGuestMessage bounds a message, in bytes.
	maxGuestMessage = 64 << 10
	// maxSkipped bounds what is skipped before a message, in bytes: what a session can
	// have left over is what fits between two ends.
	maxSkipped = 4 << 20

	maxWarnings = 16
	maxSteps    = 64
	maxText     = 200 // of a warning or an error, in characters
	maxName     = 64  // of a version, a kernel or a step, in characters
	maxRandom   = 64  // bytes
	maxIdentity = 128 // of each part of the identity, in bytes
)

// ReadAnswer reads the next [Answer] of a guest, which is not trusted.
func ReadAnswer(r io.Reader) (Answer, error) {
	var answer Answer
	if err := read(r, &answer, maxSkipped, maxGuestMessage); err != nil {
		return Answer{}, err
	}
	if err := answer.limit(); err != nil {
		return Answer{}, fmt.Errorf("read the agent's answer: %w", err)
	}
	return answer, nil
}

// ReadControlAnswer reads a [ControlAnswer] of a guest, which is not trusted.
func ReadControlAnswer(r io.Reader) (ControlAnswer, error) {
	var answer ControlAnswer
	err := read(r, &answer, 0, maxGuestMessage)
	answer.Error = Text(answer.Error, maxText)
	return answer, err
}

// limit cuts an answer down to what is kept of it.
func (a *Answer) limit() error {
	a.Version, a.Kernel, a.Error = Text(a.Version, maxName), Text(a.Kernel, maxName), Text(a.Error, 2*maxText)
	a.Warnings = a.Warnings[:min(len(a.Warnings), maxWarnings)]
	for i, warning := range a.Warnings {
		a.Warnings[i] = Text(warning, maxText)
	}
	a.Timeline = a.Timeline[:min(len(a.Timeline), maxSteps)]
	for i, step := range a.Timeline {
		a.Timeline[i] = Step{Name: Text(step.Name, maxName), At: max(step.At, 0)}
	}
	return a.Identity.check()
}

// check refuses an identity that no agent has.
func (i Identity) check() error {
	for name, value := range map[string]string{
		"hostname": i.Hostname, "machine id": i.MachineID, "boot id": i.BootID, "host key": i.HostKey, "MAC": i.MAC,
	} {
		if len(value) > maxIdentity || value != Text(value, maxIdentity) {
			return fmt.Errorf("%w: its %s is %q", ErrProtocol, name, Text(value, maxName))
		}
	}
	random, err := hex.DecodeString(i.Random)
	if err == nil && len(random) > maxRandom {
		err = errors.New("too long")
	}
	if err != nil {
		return fmt.Errorf("%w: its sample of random numbers: %w", ErrProtocol, err)
	}
	return nil
}

// Text makes a guest's text fit to be shown and kept: at most so many characters, none
// of which can steer a terminal.
func Text(s string, limit int) string {
	var b strings.Builder
	for _, r := range s { // what is no UTF-8 comes as U+FFFD
		if limit == 0 {
			break
		}
		limit--
		switch {
		case r == '\n' || r == '\t':
			r = ' '
		case !unicode.IsPrint(r):
			r = unicode.ReplacementChar
		}
		b.WriteRune(r)
	}
	return b.String()
}
