"""The HTTP front: OpenAI API in, token channel out.

A request is templated, tokenised and hashed once (`prompt`), waits if it must (`admission`), goes to the
worker that will answer first (`routing` over `index`, `load` and `rates`), and its tokens are turned back
into text and relayed (`relay`, `text`). `dispatch` holds these together; `router.Router` is all of it as an
ASGI application. `index`, `load`, `rates`, `routing` and `admission` know neither clock nor network, and
nothing is imported here, so that tests and replayers can drive them alone.
"""
