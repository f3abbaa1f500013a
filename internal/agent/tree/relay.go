package tree

// Relay passes a stream on, to its end. What it passes on has been checked, so the
// receiver gets a stream that is one; the notes go to the decoder's Note.
func Relay(in *Decoder, out *Encoder) error {
	for {
		event, err := in.Next()
		if err != nil {
			return err
		}
		switch event.Kind {
		case EventEntry:
			err = out.Begin(event.Entry)
		case EventData:
			err = out.Data(event.Data)
		case EventHole:
			err = out.Hole(event.Hole)
		case EventEndFile:
			err = out.EndFile(event.Failure)
		case EventLeave:
			err = out.Leave()
		case EventEnd:
			return out.End()
		}
		if err != nil {
			return err
		}
	}
}
