//! Tables without borders, like kubectl's.

use comfy_table::{Table as Layout, presets};

/// Rows of cells under upper-case headers; the `wide` columns come last.
#[derive(Debug)]
pub(super) struct Table {
    layout: Layout,
    columns: usize,
}

impl Table {
    pub(super) fn new(narrow: &[&str], wide: &[&str], is_wide: bool) -> Self {
        let headers: Vec<_> = narrow.iter().chain(wide.iter().filter(|_| is_wide)).collect();
        let mut layout = Layout::new();
        layout.load_style(presets::NOTHING).set_header(&headers);
        for column in layout.column_iter_mut() {
            column.set_padding((0, 3));
        }
        Self {
            layout,
            columns: headers.len(),
        }
    }

    /// Cells beyond the columns that are shown are left out; empty ones become `-`.
    pub(super) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        let cells = cells
            .into_iter()
            .take(self.columns)
            .map(|cell| match printable(&cell) {
                cell if cell.is_empty() => "-".to_owned(),
                cell => cell,
            });
        self.layout.add_row(cells.collect::<Vec<_>>());
    }

    /// One line each, without trailing spaces.
    pub(super) fn render(&self) -> String {
        self.layout
            .lines()
            .map(|line| line.trim_end().to_owned() + "\n")
            .collect()
    }
}

/// Without what could steer the terminal or break the line.
pub(super) fn printable(text: &str) -> String {
    text.chars()
        .map(|character| {
            if character.is_control() {
                '\u{fffd}'
            } else {
                character
            }
        })
        .collect()
}
