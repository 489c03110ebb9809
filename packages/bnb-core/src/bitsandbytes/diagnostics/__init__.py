"""What is installed here, whether it works, and what mends it; the ``bnb doctor`` command prints it."""
