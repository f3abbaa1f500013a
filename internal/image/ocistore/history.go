package ocistore

import (
	"bytes"
	"fmt"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// Step is one step by which an image was made, as its configuration tells.
type Step struct {
	// CreatedAt is the time of the step; zero if it is not known.
	CreatedAt time.Time
	// CreatedBy is the command, and Comment what was said of it.
	CreatedBy, Comment string
	// Layer is what it made; nil if it changed the configuration only.
	Layer *Layer
}

// History returns the steps by which an image was made, the earliest first. Layers that no step
// tells of have one of their own.
func (s *Store) History(image Image) ([]Step, error) {
	text, err := s.readDocument(image.Config)
	if err != nil {
		return nil, fmt.Errorf("history of image %s: %w", image.Name, err)
	}
	config, err := v1.ParseConfigFile(bytes.NewReader(text))
	if err != nil {
		return nil, fmt.Errorf("history of image %s: %w", image.Name, err)
	}
	steps := []Step{}
	left := image.Layers
	for _, entry := range config.History {
		step := Step{CreatedAt: entry.Created.UTC(), CreatedBy: entry.CreatedBy, Comment: entry.Comment}
		if !entry.EmptyLayer && len(left) > 0 {
			step.Layer, left = &left[0], left[1:]
		}
		steps = append(steps, step)
	}
	for i := range left {
		steps = append(steps, Step{Layer: &left[i]})
	}
	return steps, nil
}
