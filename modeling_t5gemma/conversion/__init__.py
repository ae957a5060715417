"""From decoder-only checkpoints to encoder-decoder ones, a few megabytes at a time.

``source`` finds and reads what the user names, ``families`` say how, ``target`` decides what comes out, ``plan`` where
each tensor of it comes from, ``streaming`` and ``staging`` write it, ``convert`` does it all in order.
"""
