package flowlog

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/smolvm/smolvm"
)

// MaxLine is how long a line may be, in bytes, with its line break: more than the longest record
// has; see [clean].
const MaxLine = 64 << 10

// hashBegin and hashEnd are around the hash, at the end of each line.
const (
	hashBegin = `,"hash":"`
	hashEnd   = `"}`
	hashChars = 2 * sha256.Size
	hashSize  = len(hashBegin) + hashChars + len(hashEnd)
)

// seal returns the line of a record, with its line break, and its hash. The record's Number and
// Prev are set.
func seal(r smolvm.FlowRecord) (line []byte, hash string, err error) {
	r.Hash = ""
	text, err := r.MarshalJSON() // and not json.Marshal, which would encode it twice
	if err != nil {
		return nil, "", fmt.Errorf("encode a flow record: %w", err)
	}
	text = bytes.TrimSuffix(bytes.TrimSpace(text), []byte("}"))
	hash = hashOf(text)
	line = append(append(append(append(text, hashBegin...), hash...), hashEnd...), '\n')
	if len(line) > MaxLine {
		return nil, "", fmt.Errorf("a flow record of %d bytes is too long", len(line))
	}
	return line, hash, nil
}

// hashOf returns the hash of what stands before it in a line.
func hashOf(text []byte) string {
	sum := sha256.Sum256(text)
	return hex.EncodeToString(sum[:])
}

// open returns the record of a line, which comes without its line break. The record is returned
// as far as it can be read also if its hash does not fit.
func open(line []byte) (smolvm.FlowRecord, error) {
	var r smolvm.FlowRecord
	if err := json.Unmarshal(line, &r); err != nil {
		return r, errors.New("it is no record")
	}
	text := line[:max(0, len(line)-hashSize)]
	end := line[len(text):]
	if len(text) == 0 || !bytes.HasPrefix(end, []byte(hashBegin)) || !bytes.HasSuffix(end, []byte(hashEnd)) {
		return r, errors.New("it does not end with its hash")
	}
	if hash := end[len(hashBegin) : len(hashBegin)+hashChars]; hashOf(text) != string(hash) || r.Hash != string(hash) {
		return r, errors.New("its hash is not that of what stands in it")
	}
	return r, nil
}

// Chain checks that lines are those of one log, each as it was written, in their order and
// without gaps. The zero value takes any record as the first: what came before it may have been
// removed as the log is bounded.
type Chain struct {
	number int64
	hash   string
}

// Next returns the record of the next line, which comes without its line break. An error matches
// [smolvm.ErrFlowLogChanged]; the record is returned with it as far as it can be read, and the
// chain goes on from there.
func (c *Chain) Next(line []byte) (smolvm.FlowRecord, error) {
	r, err := open(line)
	before := *c
	*c = Chain{number: r.Number, hash: r.Hash}
	switch {
	case err != nil && before.number == 0:
		return r, fmt.Errorf("%w: the first line: %w", smolvm.ErrFlowLogChanged, err)
	case err != nil:
		return r, fmt.Errorf("%w: the line after record %d: %w", smolvm.ErrFlowLogChanged, before.number, err)
	case before.number == 0 && (r.Number == 1) != (r.Prev == ""), r.Number < 1:
		return r, fmt.Errorf("%w: the first line can't be record %d", smolvm.ErrFlowLogChanged, r.Number)
	case before.number == 0:
		return r, nil
	case r.Number > before.number+1:
		return r, fmt.Errorf("%w: records %d to %d are missing", smolvm.ErrFlowLogChanged, before.number+1, r.Number-1)
	case r.Number != before.number+1 || r.Prev != before.hash:
		return r, fmt.Errorf("%w: record %d does not follow record %d", smolvm.ErrFlowLogChanged, r.Number, before.number)
	}
	return r, nil
}
