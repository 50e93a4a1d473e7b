"""pydist in other libraries, by their own extension points; each module imports its library alone.

They are clients of the public interface: what they do, a script can do by the same calls.
"""
