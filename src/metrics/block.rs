//! Blocks of a metrics page: metric families, each with its members.
//!
//! A page is generic over what it exports. Each measuring component implements [`Series`]: its metric
//! families, and the number of lines that one member adds, which counts towards `metrics.series_max`.

use std::any::{Any, TypeId};
use std::fmt;
use std::sync::Arc;

use super::text::{ExpositionFormat, Family};

/// The metrics of one path, loop or other unit that is counted together.
pub trait Series: fmt::Debug + Send + Sync + Sized + 'static {
    /// The metric families, in alphabetical order. No other type has families of these names.
    const FAMILIES: &'static [Family<Self>];

    /// Maximum number of lines that one member adds to a page, for types whose members do not differ in it.
    const LINES: usize;

    /// Maximum number of lines that this member adds to a page.
    fn lines_max(&self) -> usize {
        Self::LINES
    }
}

/// A [`Series`] with its type erased.
pub trait AnySeries: fmt::Debug + Send + Sync {
    /// Maximum number of lines that it adds to a page.
    fn lines(&self) -> usize;

    /// Adds itself to `blocks`.
    fn add_to(self: Arc<Self>, blocks: &mut Blocks);
}

impl<S: Series> AnySeries for S {
    fn lines(&self) -> usize {
        self.lines_max()
    }

    fn add_to(self: Arc<Self>, blocks: &mut Blocks) {
        blocks.add(self);
    }
}

/// All members of one type.
trait Block: fmt::Debug + Send + Sync {
    fn families(&self) -> Vec<&'static str>;

    fn begin(&self, family: usize, page: &mut Vec<u8>, format: ExpositionFormat);

    /// Writes the lines of some members after the first `written`. Returns how many members are written so
    /// far, or `None` when all are.
    fn write(&self, family: usize, written: usize, page: &mut Vec<u8>) -> Option<usize>;

    fn as_any_mut(&mut self) -> &mut dyn Any;
}

#[derive(Debug)]
struct BlockOf<S> {
    members: Vec<Arc<S>>,
}

/// Members written before the page checks whether the piece is long enough.
const MEMBERS_AT_ONCE: usize = 64;

impl<S: Series> Block for BlockOf<S> {
    fn families(&self) -> Vec<&'static str> {
        S::FAMILIES.iter().map(|family| family.name).collect()
    }

    fn begin(&self, family: usize, page: &mut Vec<u8>, format: ExpositionFormat) {
        S::FAMILIES[family].begin(page, format);
    }

    fn write(&self, family: usize, written: usize, page: &mut Vec<u8>) -> Option<usize> {
        let end = self.members.len().min(written + MEMBERS_AT_ONCE);
        S::FAMILIES[family].write(page, self.members[written..end].iter().map(Arc::as_ref));
        (end < self.members.len()).then_some(end)
    }

    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }
}

/// Blocks of different types, each type once.
#[derive(Debug, Default)]
pub struct Blocks {
    blocks: Vec<(TypeId, Box<dyn Block>)>,
}

/// Position of a family in [`Blocks`].
#[derive(Debug, Clone, Copy)]
pub(super) struct FamilyIndex {
    block: usize,
    family: usize,
}

impl Blocks {
    /// Adds a member after those of the same type.
    pub fn add<S: Series>(&mut self, member: Arc<S>) {
        let id = TypeId::of::<S>();
        let index = self.blocks.iter().position(|(known, _)| *known == id).unwrap_or_else(|| {
            self.blocks.push((id, Box::new(BlockOf::<S> { members: Vec::new() })));
            self.blocks.len() - 1
        });
        let block = self.blocks[index].1.as_any_mut().downcast_mut::<BlockOf<S>>();
        block.expect("a block is kept under the type of its members").members.push(member);
    }

    /// Returns all families with their names.
    pub(super) fn families(&self) -> impl Iterator<Item = (&'static str, FamilyIndex)> + '_ {
        self.blocks.iter().enumerate().flat_map(|(block, (_, all))| {
            all.families()
                .into_iter()
                .enumerate()
                .map(move |(family, name)| (name, FamilyIndex { block, family }))
        })
    }

    /// Writes a family, or some of its members after the first `written`. Returns how many members are
    /// written so far, or `None` when all are.
    pub(super) fn write(
        &self,
        FamilyIndex { block, family }: FamilyIndex,
        written: usize,
        format: ExpositionFormat,
        page: &mut Vec<u8>,
    ) -> Option<usize> {
        let (_, block) = &self.blocks[block];
        if written == 0 {
            block.begin(family, page, format);
        }
        block.write(family, written, page)
    }
}
