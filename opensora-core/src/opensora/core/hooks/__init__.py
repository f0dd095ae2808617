"""The built-in behaviour of runs, written over the same hooks as anyone's."""
