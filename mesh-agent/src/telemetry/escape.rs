//! Text from outside, made fit for a line of a log: nothing in it can end the line, the field or the colour.

use std::fmt::{self, Write};

/// Writes into `out` with everything escaped as JSON strings do, and cut after `left` bytes.
pub(super) struct Escaped<'a> {
    out: &'a mut String,
    left: usize,
}

impl<'a> Escaped<'a> {
    pub(super) fn new(out: &'a mut String, limit: usize) -> Self {
        Self { out, left: limit }
    }
}

impl Write for Escaped<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for character in text.chars() {
            let Some(left) = self.left.checked_sub(character.len_utf8()) else {
                if self.left > 0 {
                    self.left = 0;
                    self.out.push('…');
                }
                return Ok(());
            };
            self.left = left;
            match character {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                _ if is_unfit(character) => write!(self.out, "\\u{:04x}", u32::from(character))?,
                _ => self.out.push(character),
            }
        }
        Ok(())
    }
}

/// Control characters (which begin ANSI sequences too), line ends, and what turns the direction of writing.
/// All of them have four hexadecimal digits.
fn is_unfit(character: char) -> bool {
    character.is_control()
        || matches!(character, '\u{2028}' | '\u{2029}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn escaped(text: &str, limit: usize) -> String {
        let mut out = String::new();
        Escaped::new(&mut out, limit).write_str(text).unwrap();
        out
    }

    #[test]
    fn nothing_can_end_a_line_or_a_field() {
        assert_eq!(
            escaped("a\r\n\"b\" \\ \x1b[31m \x07 é \u{85}\u{2028}\u{202e}", 100),
            r#"a\u000d\u000a\"b\" \\ \u001b[31m \u0007 é \u0085\u2028\u202e"#
        );
    }

    #[test]
    fn long_values_are_cut_between_characters() {
        assert_eq!(escaped("abcdef", 6), "abcdef");
        assert_eq!(escaped("abcdefg", 6), "abcdef");
        assert_eq!(escaped("aéé", 4), "aé…");
    }
}
