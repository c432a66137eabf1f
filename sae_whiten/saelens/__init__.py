"""Everything that knows SAELens."""
