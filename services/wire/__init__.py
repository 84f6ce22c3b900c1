"""What crosses between the parts: block hashes, messages, and the token channel that carries them.

Imported by every service; imports none. `hashes` names blocks, `messages` are the frames' contents,
`channel` is the router's end of the TCP connection and `channel_server` the worker's: authenticated,
versioned, bounded, one frame an engine step.
"""
