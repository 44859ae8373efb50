"""Many runs for one question: where does a larger batch stop to save steps?"""
