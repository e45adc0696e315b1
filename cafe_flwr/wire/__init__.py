"""The message contract between strategy and nodes: one record of arrays, one of settings, one of metrics.

A node hosts one or more clients, and one message a round serves all that take part. Every message has one flat array
(key ``flat``):

- down: the shared part, then the download of every client in ``downloads``, in that order;
- up: the shared part, then the upload of every client in ``clients``, in that order. A node that reports several
  clients sends Σ n_i·θ_i as its shared part, in float64, each value in the place of two float32. So it sends one
  backbone per node, and the average does not depend on which node hosts whom (see ``averaging``).

Where clients are not alike (:mod:`cafe_flwr.wire.capacity`), the shared part of a message is what its clients hold
together: down, the clients it is for; up, those reported. Each value is summed over the clients that hold it.

With ``wire-dtype = "float16"`` every value takes half of the space, both ways: float16 for float32, float32 for the
sums. A shared part then goes up as its difference to what came down, Δ_i = θ_i − θ, or Σ n_i·Δ_i, since small numbers
keep more digits.

Lists of per-client values are flattened, client after client.
"""
