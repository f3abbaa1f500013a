package manager

import "github.com/smolvm/smolvm/internal/vmm"

// WithBackends has a Manager know backends by other traits than package traits lists.
func WithBackends(config Config, known ...vmm.Traits) Config {
	config.backends = known
	return config
}
