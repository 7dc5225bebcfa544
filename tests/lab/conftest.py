from hypothesis import settings

# Examples are the same in every run, and a slow machine fails no test. To search for new counterexamples:
# pytest tests/lab --hypothesis-profile=search
settings.register_profile("lab", deadline=None, max_examples=60, derandomize=True)
settings.register_profile("search", deadline=None, max_examples=1000)
settings.load_profile("lab")
