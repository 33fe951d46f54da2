"""Pictures of what TokenMixup does, and of how a training went."""
