"""From KernelSpec to a callable: catalogue, rendering, building, loading, timing."""
