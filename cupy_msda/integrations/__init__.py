# SPDX-License-Identifier: Apache-2.0
"""Adapters to other people's code, one module each."""
