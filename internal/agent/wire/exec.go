package wire

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"unicode/utf8"
)

// ExecRequest asks for a command; see [ExecChannel].
type ExecRequest struct {
	Args []string `json:"args,omitempty"`
	Env  []string `json:"env,omitempty"`
	Dir  string   `json:"dir,omitempty"`
	User string   `json:"user,omitempty"`
	TTY  *TTY     `json:"tty,omitempty"`
	// NoStdin gives the command an empty input, without a message to say so.
	NoStdin bool `json:"no_stdin,omitempty"`
	// Words replaces the texts of a request that has been packed.
	Words *Words `json:"words,omitempty"`
}

// Words says how many texts the channel's data begins with. They are user, directory,
// terminal, arguments and environment, each followed by a NUL.
type Words struct {
	Args int `json:"args"`
	Env  int `json:"env"`
	// Size of all of them, in bytes.
	Size int `json:"size"`
}

// TTY is the terminal of an [ExecRequest].
type TTY struct {
	Term    string `json:"term,omitempty"`
	Columns int    `json:"columns"`
	Rows    int    `json:"rows"`
}

const (
	// MaxWords bounds the texts of a request, in bytes. Linux takes no more than 6 MiB of
	// arguments and environment, whatever its limits are set to; see execve(2).
	MaxWords = 8 << 20
	// maxOpenRequest is how large a request may be that is part of opening a channel, in
	// bytes. An SSH packet can be twice as large.
	maxOpenRequest = 128 << 10
	// placeWords are the texts beside arguments and environment.
	placeWords = 3
)

// Pack encodes a request. If its texts are too long for one packet, or are not all UTF-8,
// which JSON can't carry, they are to be sent as the first of the channel's data.
func (r ExecRequest) Pack() (request, words []byte) {
	packed, words := r.Fold()
	return encode(packed), words
}

// Fold returns a request that can be encoded, with the texts that it leaves out; see
// [ExecRequest.Pack].
func (r ExecRequest) Fold() (request ExecRequest, words []byte) {
	texts := append(append([]string{r.User, r.Dir, ""}, r.Args...), r.Env...)
	if r.TTY != nil {
		texts[2] = r.TTY.Term
	}
	size, text := 0, true
	for _, word := range texts {
		size += len(word) + 1
		text = text && utf8.ValidString(word)
	}
	if text && size < maxOpenRequest {
		if len(encode(r)) <= maxOpenRequest {
			return r, nil
		}
	}
	packed := ExecRequest{NoStdin: r.NoStdin, Words: &Words{len(r.Args), len(r.Env), size}}
	if r.TTY != nil {
		packed.TTY = &TTY{Columns: r.TTY.Columns, Rows: r.TTY.Rows}
	}
	words = make([]byte, 0, size)
	for _, word := range texts {
		words = append(append(words, word...), 0)
	}
	return packed, words
}

func encode(r ExecRequest) []byte {
	text, err := json.Marshal(r)
	if err != nil {
		panic(err) // there is nothing in it that can't be encoded
	}
	return text
}

// Unpack reads the texts of a request that was packed from the channel's data.
func (r *ExecRequest) Unpack(data io.Reader) error {
	w := r.Words
	if w == nil {
		return nil
	}
	if w.Size < 0 || w.Size > MaxWords || w.Args < 0 || w.Env < 0 || w.Args > w.Size || w.Env > w.Size {
		return fmt.Errorf("a command of %d bytes, %d arguments and %d variables", w.Size, w.Args, w.Env)
	}
	text := make([]byte, w.Size)
	if _, err := io.ReadFull(data, text); err != nil {
		return fmt.Errorf("read the command's words: %w", err)
	}
	words := make([]string, 0, placeWords+w.Args+w.Env)
	for len(text) > 0 {
		word, rest, found := bytes.Cut(text, []byte{0})
		if !found || len(words) == cap(words) {
			return errors.New("the command's words are not as many as announced")
		}
		words, text = append(words, string(word)), rest
	}
	if len(words) != placeWords+w.Args+w.Env {
		return errors.New("the command's words are not as many as announced")
	}
	r.User, r.Dir = words[0], words[1]
	if r.TTY != nil {
		r.TTY.Term = words[2]
	}
	r.Args, r.Env, r.Words = words[placeWords:placeWords+w.Args:placeWords+w.Args], words[placeWords+w.Args:], nil
	return nil
}
