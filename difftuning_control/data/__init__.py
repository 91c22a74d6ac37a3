"""From picture files to a training batch: pictures, latents, embeddings, conditions, the knowledge bank."""
