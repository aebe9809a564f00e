"""The same commands on a Ray cluster: the only package that knows Ray, which it imports when it connects."""
