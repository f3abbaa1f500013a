package errcode_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"testing"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/errcode"
)

// Errors are the same on the other side of JSON: words, kind, sentinels, types and hint.
func TestTravel(t *testing.T) {
	for _, err := range []error{
		fmt.Errorf("start VM %q: %w", "web", smolvm.ErrBootTimeout),
		fmt.Errorf("%w: %q", smolvm.ErrVMNotFound, "web"),
		&smolvm.Error{Op: "build", Kind: "image", ID: "base", Hint: "`smolvm doctor` says how", Err: smolvm.ErrImageNotFound},
		&smolvm.ValidationError{ID: "web", Fields: []smolvm.FieldError{{Field: "vcpus", Problem: "99 is out of range"}}},
		fmt.Errorf("%w: %w", smolvm.ErrVMNotFound, &smolvm.ValidationError{Fields: []smolvm.FieldError{{Field: "id", Problem: "is empty"}}}),
		fmt.Errorf("start: %w", &smolvm.PrerequisiteError{Backend: "qemu", Findings: []smolvm.Finding{{Name: "qemu", Problem: "is missing"}}}),
		&smolvm.NetworkError{ID: "web", Op: "forward", Err: fmt.Errorf("port 80: %w", smolvm.ErrPortInUse)},
		fmt.Errorf("read: %w", fs.ErrNotExist),
		fmt.Errorf("wait: %w", context.Canceled),
		errors.New("something else"),
	} {
		t.Run(err.Error(), func(t *testing.T) {
			text, jsonErr := json.Marshal(errcode.Of(err))
			if jsonErr != nil {
				t.Fatal(jsonErr)
			}
			var failure errcode.Failure
			if err := json.Unmarshal(text, &failure); err != nil {
				t.Fatal(err)
			}
			got := failure.Err()
			if got.Error() != err.Error() || smolvm.CodeOf(got) != smolvm.CodeOf(err) || smolvm.HintOf(got) != smolvm.HintOf(err) {
				t.Errorf("%s\narrived as %q, %s, hint %q", text, got, smolvm.CodeOf(got), smolvm.HintOf(got))
			}
			if sentinel := smolvm.CodeOf(err).Err(); sentinel != nil && !errors.Is(got, sentinel) {
				t.Errorf("it does not match %q any more", sentinel)
			}
			checkType[*smolvm.ValidationError](t, err, got)
			checkType[*smolvm.PrerequisiteError](t, err, got)
			checkType[*smolvm.NetworkError](t, err, got)
		})
	}
	if errcode.Of(nil).Err() != nil {
		t.Error("no error arrives as one")
	}
}

// checkType fails if one error is of a type and the other is not, or says something else.
func checkType[E error](t *testing.T, before, after error) {
	t.Helper()
	was, had := errors.AsType[E](before)
	is, has := errors.AsType[E](after)
	if had != has || had && was.Error() != is.Error() {
		t.Errorf("%T was %v, %v; is %v, %v", was, had, was, has, is)
	}
}
