package flowlog

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/ring"
)

// Read calls each for the records of the log at a path, the oldest first, until it returns false.
// A log that is not there has none. What is left of a last line that was not written whole is
// passed over.
//
// With the option Follow it goes on with records as they are written, until writerEnd returns or
// ctx is done. A line that does not fit the chain is an error that matches
// [smolvm.ErrFlowLogChanged], and the end, unless the option Unverified is set.
func Read(ctx context.Context, path string, opts smolvm.FlowOptions, writerEnd func(context.Context) error,
	each func(smolvm.FlowRecord) bool,
) error {
	log, err := ring.NewReader(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil && opts.Follow {
		err = log.Follow(ctx, writerEnd)
	}
	if log != nil {
		defer func() { _ = log.Close() }()
	}
	if err != nil {
		return err
	}
	return readLines(ctx, log, opts, each)
}

// readLines is Read of lines that come from a reader.
func readLines(ctx context.Context, log io.Reader, opts smolvm.FlowOptions, each func(smolvm.FlowRecord) bool) error {
	var chain Chain
	lines := bufio.NewReaderSize(log, MaxLine)
	for {
		line, err := lines.ReadSlice('\n')
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		var r smolvm.FlowRecord
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case errors.Is(err, bufio.ErrBufferFull):
			if !opts.Unverified {
				return fmt.Errorf("%w: a line is longer than any that is written", smolvm.ErrFlowLogChanged)
			}
			if err := skipLine(lines); err != nil {
				return err
			}
			continue
		case err != nil:
			return err
		default:
			line = bytes.TrimSuffix(line, []byte("\n"))
			r, err = chain.Next(line)
			r.Line = string(line)
		}
		if err != nil && !opts.Unverified {
			return err
		}
		if (err == nil || r.Kind != "") && !each(r) {
			return nil
		}
	}
}

// skipLine reads up to the end of a line.
func skipLine(lines *bufio.Reader) error {
	for {
		_, err := lines.ReadSlice('\n')
		if errors.Is(err, io.EOF) {
			return nil
		}
		if !errors.Is(err, bufio.ErrBufferFull) {
			return err
		}
	}
}
