package wire

import (
	"io"
	"time"

	"github.com/hashicorp/yamux"
)

// MuxConfig is how both ends of a channel are set up.
func MuxConfig() *yamux.Config {
	config := yamux.DefaultConfig()
	// A guest that is paused, or starved by its host, answers late; that is no
	// reason to give it up. The VMM's end closes the channel.
	config.EnableKeepAlive = false
	config.ConnectionWriteTimeout = time.Hour
	config.StreamOpenTimeout = 0
	config.StreamCloseTimeout = time.Hour
	config.MaxStreamWindowSize = 1 << 20
	config.LogOutput = io.Discard
	return config
}
