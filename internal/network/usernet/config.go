// Package usernet connects one VM by a user-space TCP/IP stack, without privilege.
package usernet

import "github.com/smolvm/smolvm/internal/network"

// Config describes the network of one VM.
type Config = network.Config

var (
	_ network.Attachment   = (*Network)(nil)
	_ network.EgressSetter = (*Network)(nil)
	_ network.Recorded     = (*Network)(nil)
	_ network.Claimer      = (*Network)(nil)
)
