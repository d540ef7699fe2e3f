"""Which fields has a row, and how is each format read into an example?"""
