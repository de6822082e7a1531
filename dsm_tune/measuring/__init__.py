"""What a merged model is worth."""
