"""How are adapters merged, models interpolated, averaged and exported?"""
