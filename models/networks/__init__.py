"""Networks that the zoo's recipes share.

Each is called on ONE event, as ``network(x, t)``.
"""
